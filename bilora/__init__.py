"""bilora: fine-tuning that looks for flat minima, and the methods it is compared with."""
