# PISCO's public training data: questions with Wikipedia passages and the answers of Mistral-7B, which are part of what
# OSCAR was trained on. From the Hugging Face hub, by the library `datasets` (pip install datasets).
dataset = "pisco"
examples = "maxoul/pisco_finetuning_data"
val_fraction = 0.002
