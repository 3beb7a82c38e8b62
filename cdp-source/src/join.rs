//! Redeems a bundle: keys are made here and stay here.
