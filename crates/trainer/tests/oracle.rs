//! The trainer against figures that transformers, PEFT and torch computed: see `fixtures/make_fixtures.py`.

use std::path::Path;

use holdfast_trainer::oracle;

fn every_figure_holds(case: &str) -> anyhow::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(case);
    let figures = oracle::check(&folder, None)?;
    let off: Vec<_> = figures.iter().filter(|figure| !figure.is_ok()).collect();
    assert!(off.is_empty(), "{} of {} figures are off: {off:#?}", off.len(), figures.len());
    assert!(figures.len() > 400, "only {} figures were compared", figures.len());
    Ok(())
}

#[test]
fn a_tied_llama_with_plain_rotary_positions_computes_every_reference_figure() -> anyhow::Result<()> {
    every_figure_holds("smollm2")
}

#[test]
fn an_untied_llama_with_scaled_rotary_positions_computes_every_reference_figure() -> anyhow::Result<()> {
    every_figure_holds("llama3")
}
