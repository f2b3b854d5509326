"""Changes to make and the seconds they are predicted to save: sentences over the one predictor."""
