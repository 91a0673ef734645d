"""What a result is worth: PSNR, SSIM, tOF, tLP, perceptual distances, and reports of them."""
