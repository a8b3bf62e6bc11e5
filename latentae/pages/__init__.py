"""The pages people read: blocks and charts, the evaluation page, and runs side by side."""
