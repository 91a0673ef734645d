"""What the original single file of the SD x4 upscaler holds, written down independently of our key tables."""

from stablevsr.config import TextConfig, UNetConfig

UNET, FIRST_STAGE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."


class Layout(dict):
    """Names and shapes of a file, found by walking through the networks in the order of the original code."""

    def conv(self, name, narrow, wide, kernel=3):
        self[f"{name}.weight"], self[f"{name}.bias"] = (wide, narrow, kernel, kernel), (wide,)

    def linear(self, name, narrow, wide):
        self[f"{name}.weight"], self[f"{name}.bias"] = (wide, narrow), (wide,)

    def norm(self, name, width):
        self[f"{name}.weight"], self[f"{name}.bias"] = (width,), (width,)

    def unet_block(self, name, narrow, wide, time):
        self.norm(f"{name}.in_layers.0", narrow)
        self.conv(f"{name}.in_layers.2", narrow, wide)
        self.linear(f"{name}.emb_layers.1", time, wide)
        self.norm(f"{name}.out_layers.0", wide)
        self.conv(f"{name}.out_layers.3", wide, wide)
        if narrow != wide:
            self.conv(f"{name}.skip_connection", narrow, wide, 1)

    def transformer(self, name, width, config, depth, only_cross):
        self.norm(f"{name}.norm", width)
        for projection in ("proj_in", "proj_out"):
            if config.linear_projection:
                self.linear(f"{name}.{projection}", width, width)
            else:
                self.conv(f"{name}.{projection}", width, width, 1)
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            first_context = config.context_dim if only_cross else width
            for attention, context in (("attn1", first_context), ("attn2", config.context_dim)):
                for projection, source in (("to_q", width), ("to_k", context), ("to_v", context)):
                    self[f"{block}.{attention}.{projection}.weight"] = (width, source)
                self.linear(f"{block}.{attention}.to_out.0", width, width)
            self.linear(f"{block}.ff.net.0.proj", width, 8 * width)
            self.linear(f"{block}.ff.net.2", 4 * width, width)
            for norm in ("norm1", "norm2", "norm3"):
                self.norm(f"{block}.{norm}", width)

    def unet(self, config: UNetConfig):
        encoder = config.encoder
        first, time = encoder.channels[0], 4 * encoder.channels[0]
        self.linear(f"{UNET}time_embed.0", first, time)
        self.linear(f"{UNET}time_embed.2", time, time)
        self[f"{UNET}label_emb.weight"] = (encoder.num_noise_levels, time)
        self.conv(f"{UNET}input_blocks.0.0", encoder.in_channels, first)
        width, number, skips = first, 1, [first]
        for level, wide in enumerate(encoder.channels):
            for _ in range(encoder.blocks_per_level[level]):
                self.unet_block(f"{UNET}input_blocks.{number}.0", width, wide, time)
                width = wide
                self.maybe_transformer(f"{UNET}input_blocks.{number}.1", encoder, level)
                number, skips = number + 1, [*skips, width]
            if level < len(encoder.channels) - 1:
                self.conv(f"{UNET}input_blocks.{number}.0.op", width, width)
                number, skips = number + 1, [*skips, width]
        self.unet_block(f"{UNET}middle_block.0", width, width, time)
        self.transformer(f"{UNET}middle_block.1", width, encoder, encoder.transformer_depth[-1], False)
        self.unet_block(f"{UNET}middle_block.2", width, width, time)
        number = 0
        for level, wide in reversed(list(enumerate(encoder.channels))):
            for i in range(encoder.blocks_per_level[level] + 1):
                self.unet_block(f"{UNET}output_blocks.{number}.0", width + skips.pop(), wide, time)
                width = wide
                behind = 1 + self.maybe_transformer(f"{UNET}output_blocks.{number}.1", encoder, level)
                if level and i == encoder.blocks_per_level[level]:
                    self.conv(f"{UNET}output_blocks.{number}.{behind}.conv", width, width)
                number += 1
        self.norm(f"{UNET}out.0", width)
        self.conv(f"{UNET}out.2", width, config.out_channels)

    def maybe_transformer(self, name, config, level):
        if config.attention[level]:
            only_cross = config.only_cross_attention[level]
            self.transformer(name, config.channels[level], config, config.transformer_depth[level], only_cross)
        return config.attention[level]

    def vae_block(self, name, narrow, wide):
        self.norm(f"{name}.norm1", narrow)
        self.conv(f"{name}.conv1", narrow, wide)
        self.norm(f"{name}.norm2", wide)
        self.conv(f"{name}.conv2", wide, wide)
        if narrow != wide:
            self.conv(f"{name}.nin_shortcut", narrow, wide, 1)

    def vae_half(self, name, widths, numbers, blocks, resample, ends):
        """Encoder or decoder, apart from the order of its parts; `ends` are the channels that come in and go out."""
        self.conv(f"{name}.conv_in", ends[0], widths[0])
        width = widths[0]
        for wide, number in zip(widths, numbers, strict=True):
            for i in range(blocks):
                self.vae_block(f"{name}.{number}.block.{i}", width, wide)
                width = wide
            if number != numbers[-1]:
                self.conv(f"{name}.{number}.{resample}.conv", width, width)
        middle = max(widths)
        for i in (1, 2):
            self.vae_block(f"{name}.mid.block_{i}", middle, middle)
        self.norm(f"{name}.mid.attn_1.norm", middle)
        for projection in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.mid.attn_1.{projection}", middle, middle, 1)
        self.norm(f"{name}.norm_out", width)
        self.conv(f"{name}.conv_out", width, ends[1])

    def vae(self, config):
        levels, image, latent, blocks = range(3), config.image_channels, config.latent_channels, config.blocks_per_level
        down, up = [f"down.{i}" for i in levels], [f"up.{i}" for i in reversed(levels)]
        self.vae_half(f"{FIRST_STAGE}encoder", config.channels, down, blocks, "downsample", (image, 2 * latent))
        self.vae_half(f"{FIRST_STAGE}decoder", config.channels[::-1], up, blocks + 1, "upsample", (latent, image))
        self.conv(f"{FIRST_STAGE}quant_conv", 2 * latent, 2 * latent, 1)
        self.conv(f"{FIRST_STAGE}post_quant_conv", latent, latent, 1)

    def open_clip(self, config: TextConfig, layers):
        width = config.width
        self[f"{CLIP}positional_embedding"] = (config.num_tokens, width)
        self[f"{CLIP}text_projection"] = (width, width)
        self[f"{CLIP}logit_scale"] = ()
        self[f"{CLIP}token_embedding.weight"] = (config.vocab_size, width)
        for i in range(layers):
            block = f"{CLIP}transformer.resblocks.{i}"
            self.norm(f"{block}.ln_1", width)
            self[f"{block}.attn.in_proj_weight"], self[f"{block}.attn.in_proj_bias"] = (3 * width, width), (3 * width,)
            self.linear(f"{block}.attn.out_proj", width, width)
            self.norm(f"{block}.ln_2", width)
            self.linear(f"{block}.mlp.c_fc", width, config.mlp_width)
            self.linear(f"{block}.mlp.c_proj", config.mlp_width, width)
        self.norm(f"{CLIP}ln_final", width)


def layout(config):
    names = Layout()
    names.unet(config.unet)
    names.vae(config.vae)
    names.open_clip(config.text, config.text.num_layers + 1)
    return names
