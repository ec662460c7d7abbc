"""Fine-tuning a pre-trained model on a task, and the report that says whether pre-training was worth it."""
