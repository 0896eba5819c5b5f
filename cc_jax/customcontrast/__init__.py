"""The paper: Q-Formers, TV Fusion, MFI-Encoder, injection into the UNet, S+ in the prompt."""
