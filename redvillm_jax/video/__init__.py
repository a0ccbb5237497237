"""One file per video representation: from features of frames to visual tokens; imports modules alone."""
