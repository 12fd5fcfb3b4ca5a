"""Words after ``dconv`` that are more than one call: options in, text or JSON out."""
