"""What is asked of a trained model: one file a theme."""
