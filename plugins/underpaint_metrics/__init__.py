"""Built-in metrics: PSNR, SSIM, LPIPS and Fréchet distances."""

from __future__ import annotations

from typing import Any

from underpaint import hookimpl


@hookimpl
def register_metrics(register: Any) -> None:
    """Register the metrics."""
    register(
        "psnr",
        "underpaint_metrics.paired:PSNR",
        summary="Peak signal-to-noise ratio in dB, mean of the images, on 8-bit levels",
    )
    register(
        "ssim",
        "underpaint_metrics.paired:SSIM",
        summary="Structural similarity, Gaussian window of 11, on 8-bit levels",
        source="Wang et al. 2004",
    )
    register(
        "lpips",
        "underpaint_metrics.perceptual:LPIPS",
        config="underpaint_metrics.config:LpipsMetricConfig",
        tiny={"weights": "random"},
        summary="LPIPS on VGG-16, found in torch's hub folder, downloaded, or given as a file",
        source="Zhang et al. 2018",
    )
    register(
        "frechet",
        "underpaint_metrics.frechet:EncoderFrechet",
        config="underpaint_metrics.config:FrechetConfig",
        tiny={"encoder": "tiny/vit@random"},
        summary="Fréchet distance in the feature space of any registered encoder; works offline, is not FID",
        source="Dowson and Landau 1982",
    )
    register(
        "fid",
        "underpaint_metrics.fid:InceptionFID",
        config="underpaint_metrics.config:FidConfig",
        summary="Fréchet Inception distance with clean-fid's resize and features; needs the Inception file",
        source="Heusel et al. 2017; Parmar et al. 2022",
        expected_failures={"*": "It needs the Inception file, which is not shipped."},
    )
