"""Fine-tuning of a pre-trained model on a task, its report, and the comparison with training from scratch."""
