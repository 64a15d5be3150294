"""Training: the network, its optimizer and its tokenizer; `train.py` puts them together."""
