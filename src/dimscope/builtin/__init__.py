"""The model and the texts that ship with dimscope: data only."""
