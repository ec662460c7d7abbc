"""What a trained model is used for: continuing texts, filling masks, embedding, answering rows."""
