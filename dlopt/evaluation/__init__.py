"""Testing trained models: views of an image averaged, figures beyond loss and accuracy, use without training data."""
