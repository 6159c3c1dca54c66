"""Models that change a factor or two of SCANVAE: priors, guides, likelihoods, modalities."""
