//! Continuations with kept keys and values are those of reading everything again.

use std::path::Path;

use anyhow::Result;
use holdfast_dataset::batch::Batch;
use holdfast_trainer::adapter::Adapter;
use holdfast_trainer::model::Model;
use holdfast_trainer::packed::Packed;
use holdfast_trainer::stop::Stop;
use holdfast_trainer::{adapter_files, generate};
use tch::{Device, Kind};

/// The most likely token after a row, and by how many nats it leads the second.
fn next(model: &Model, adapter: &Adapter, row: &[u32]) -> (u32, f64) {
    let ids: Vec<i64> = row.iter().map(|&id| i64::from(id)).collect();
    let batch = Batch { lengths: vec![row.len()], positions: vec![ids.len() as i64 - 1], ids, targets: Vec::new() };
    let hidden = model.hidden(&Packed::new(&[(&batch, 0)], model.device), Some(adapter));
    let (values, tokens) = model.head.logits(&hidden).topk(2, -1, true, true);
    let lead = values.double_value(&[0, 0]) - values.double_value(&[0, 1]);
    (u32::try_from(tokens.int64_value(&[0, 0])).unwrap_or(0), lead)
}

#[test]
fn every_family_goes_on_as_if_it_read_each_row_again() -> Result<()> {
    tch::set_num_threads(1);
    for family in ["smollm2", "llama3", "mistral", "qwen2", "qwen2_windowed", "qwen3", "gemma3", "gemma3_capped"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
        let model = Model::load(&folder, Kind::Float, Device::Cpu)?;
        let adapter = adapter_files::read(&folder, &model)?;
        let vocabulary = u32::try_from(model.architecture.vocab_size)?;
        // Of many lengths, and longer than any window.
        let prompts: Vec<Vec<u32>> = [1_u32, 5, 5, 19, 40]
            .iter()
            .map(|&length| (0..length).map(|i| (length * 7 + i * i * 13) % vocabulary).collect())
            .collect();
        // Whatever the third prompt says second stops a row, so that rows end at different times.
        let stop = generate::greedy(&model, Some(&adapter), &prompts[2..3], &[], 2, &Stop::default())?[0][1];
        let answers = generate::greedy(&model, Some(&adapter), &prompts, &[stop], 24, &Stop::default())?;
        for (prompt, answer) in prompts.iter().zip(&answers) {
            let mut row = prompt.clone();
            for (place, &token) in answer.iter().enumerate() {
                let (expected, lead) = next(&model, &adapter, &row);
                // Two tokens that are all but equally likely may change places by rounding.
                assert!(
                    token == expected || lead < 1e-4,
                    "{family}: token {place} after {} is {token}, not {expected}",
                    prompt.len()
                );
                row.push(token);
            }
            let ended = answer.last() == Some(&stop);
            assert!(ended || answer.len() == 24, "{family}: it ended by itself");
            assert!(!answer[..answer.len() - 1].contains(&stop), "{family}: it went on after its end");
        }
    }
    Ok(())
}

#[test]
fn an_empty_prompt_has_no_answer_and_nothing_is_asked_of_no_tokens() -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama3");
    let model = Model::load(&folder, Kind::Float, Device::Cpu)?;
    let answers = generate::greedy(&model, None, &[vec![], vec![1, 2]], &[], 3, &Stop::default())?;
    assert_eq!((answers[0].len(), answers[1].len()), (0, 3));
    assert!(generate::greedy(&model, None, &[vec![1]], &[], 0, &Stop::default())?[0].is_empty());
    Ok(())
}
