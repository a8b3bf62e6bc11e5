"""Export of a model as a component that other libraries load."""
