"""The engine inside the training process: its keys, images and requests."""
