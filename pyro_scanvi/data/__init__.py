"""From an AnnData to minibatches of tensors."""
