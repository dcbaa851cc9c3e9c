"""What is thrown away after training: methods, losses, augmentations, data sets, the training loop and evaluation."""
