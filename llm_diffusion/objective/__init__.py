"""What is scored: noise, the forward process, losses, attention masks and modes; pure tensors."""
