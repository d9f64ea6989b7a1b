"""What happens around a training step: everything but the step itself."""
