"""Charts, images and templates that turn results into HTML pages and model cards."""
