"""A trained model as a component that other libraries load."""
