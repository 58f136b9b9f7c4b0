"""Adapters of Hugging Face's PEFT, written and read: LoRA and HiRA on timm's ViTs."""
