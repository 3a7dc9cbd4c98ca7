"""The network: tokenizer, sampler, encoder, decoder, and AdaMAE that joins them."""
