"""The training loop behind `beit-fast pretrain` and `beit-fast finetune`, on Hugging Face accelerate."""
