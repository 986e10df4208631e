"""Opening models: folders, hub repositories, GGUF files and the built-in one. Reads; never writes."""

BUILTIN = "builtin"  # the name of the model that ships with the package; here, because this module imports nothing
