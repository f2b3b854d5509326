"""Speed-ups of images and the vision tower."""
