"""`safecl demo --real`: the demonstration on SmolLM2-135M-Instruct, a pretrained model that the package index has."""
