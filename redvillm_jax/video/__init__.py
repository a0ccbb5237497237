"""One file per video representation: features of frames become visual tokens; imports only modules."""
