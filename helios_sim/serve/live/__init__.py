"""The live engine for clients. torch is loaded here, and only for mode=live."""
