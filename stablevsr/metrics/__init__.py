"""Quality metrics (PSNR, SSIM, tOF, tLP, perceptual distances) and reports of them."""
