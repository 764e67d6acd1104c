"""Training with iterative contrastive refinement: pairs, loss, trainer, and the folder that it leaves."""
