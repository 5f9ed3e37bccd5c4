"""Model families: the tables that name one model's modules on either side, and what they do to tensors."""
