//! What holds of training whatever the numbers are, on the small reference model.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;

use anyhow::Result;
use holdfast_base_model::files;
use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_domain::hyperparameters::{Precision, Requested};
use holdfast_domain::plan;
use holdfast_domain::progress::Step;
use holdfast_domain::safety::{Floor, KlPositions, RequestedSafety};
use holdfast_domain::{Hyperparameters, Plan};
use holdfast_trainer::adapter::{Adapter, AdapterConfig};
use holdfast_trainer::checkpoint::Checkpoints;
use holdfast_trainer::model::{Model, read_architecture};
use holdfast_trainer::reference::Reference;
use holdfast_trainer::train::{Run, alignment_gradient, task_gradient};
use holdfast_trainer::{adapter_files, gradient};
use tch::{Device, Kind, Tensor};

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2")
}

fn model() -> Result<Model> {
    let folder = fixture();
    Model::load_as(read_architecture(&folder.join(files::CONFIG))?, &folder.join(files::WEIGHTS), Kind::Float, Device::Cpu)
}

/// Rows of different lengths, each with its last tokens supervised.
fn examples(count: u32) -> Vec<Example> {
    (0..count)
        .map(|row| {
            let length = 6 + (row * 7) % 11;
            let ids: Vec<u32> = (0..length).map(|time| 3 + (row * 31 + time * 17) % 150).collect();
            let supervised = (0..length).map(|time| time + 2 + row % 3 >= length).collect();
            Example { ids, supervised }
        })
        .collect()
}

fn plan(more: Requested) -> Result<Plan> {
    let requested = Requested { precision: Some(Precision::F32), learning_rate: Some(1e-2), n_epochs: Some(3), ..more };
    Ok(Plan {
        format: plan::FORMAT,
        base_model: "m".into(),
        validation: false,
        hyperparameters: requested.resolve(8, None)?,
        safety: RequestedSafety::default().resolve(&Floor::default())?,
        seed: 5,
        checkpoint_steps: 100,
        device: "cpu".into(),
    })
}

/// libtorch's generator is one for the whole process; a trainer has a process to itself, tests do not.
static GENERATOR: Mutex<()> = Mutex::new(());

fn train(model: &Model, plan: &Plan) -> Result<(Adapter, Vec<Step>)> {
    let _alone = GENERATOR.lock();
    let (rows, alignment) = (examples(8), examples(5));
    let reference = Reference::new(model, alignment, KlPositions::Response);
    let adapter = Adapter::init(model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let mut steps = Vec::new();
    let run = Run { model, adapter: &adapter, examples: &rows, reference: Some(&reference), plan };
    run.train(&mut run.start(), |step, _| {
        steps.push(step);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok((adapter, steps))
}

fn largest_difference(x: &Tensor, y: &Tensor) -> f64 {
    (x - y).abs().max().double_value(&[])
}

#[test]
fn how_a_step_is_cut_into_passes_makes_no_difference() -> Result<()> {
    let model = model()?;
    let adapter = adapter_files::read(&fixture(), &model)?;
    let rows = examples(6);
    let batches = |per_pass: usize| rows.chunks(per_pass).map(Batch::new).collect::<Vec<_>>();
    let (whole, cut) = (task_gradient(&model, &adapter, &batches(6), false), task_gradient(&model, &adapter, &batches(2), false));
    assert!((whole.loss - cut.loss).abs() < 1e-6);
    assert!(largest_difference(&whole.gradient.0, &cut.gradient.0) < 1e-5);

    let reference = Reference::new(&model, rows, KlPositions::Response);
    let (kl, gradient) = alignment_gradient(&model, &adapter, &reference, &[(0..6).collect()], false);
    let (kl_cut, gradient_cut) = alignment_gradient(&model, &adapter, &reference, &[vec![0, 1, 2], vec![3], vec![4, 5]], false);
    assert!((kl - kl_cut).abs() < 1e-6);
    assert!(largest_difference(&gradient.0, &gradient_cut.0) < 1e-5);
    Ok(())
}

#[test]
fn the_first_step_of_a_fresh_adapter_projects_nothing() -> Result<()> {
    let model = model()?;
    let (_, steps) = train(&model, &plan(Requested::default())?)?;
    let first = steps[0].alignment.clone().expect("facts");
    assert!(first.align_kl.abs() < 1e-6 && !first.conflict, "{first:?}");
    assert!((first.coefficient - 1.0).abs() < f64::EPSILON);
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_adapter_bit_for_bit_and_another_does_not() -> Result<()> {
    let model = model()?;
    let same = plan(Requested {
        lora_dropout: Some(0.2),
        gradient_accumulation_steps: Some(2),
        batch_size: Some(2),
        ..Default::default()
    })?;
    let other = Plan { seed: 6, ..same.clone() };
    let [first, second, third] = [&same, &same, &other].map(|plan| train(&model, plan));
    let (first, second, third) = (first?.0, second?.0, third?.0);
    assert!(largest_difference(first.flat(), second.flat()).abs() < f64::MIN_POSITIVE);
    assert!(largest_difference(first.flat(), third.flat()) > 0.0);
    Ok(())
}

/// Runs `plan` up to `stop`, keeps a checkpoint, and goes on from it with an adapter that knows nothing of the first part.
fn train_with_a_stop(model: &Model, plan: &Plan, stop: u64, checkpoints: &Checkpoints) -> Result<Adapter> {
    let _alone = GENERATOR.lock();
    let (rows, reference) = (examples(8), Reference::new(model, examples(5), KlPositions::Response));
    let adapter = || Adapter::init(model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let run = |adapter: &Adapter, stop: Option<u64>, restore: bool| -> Result<bool> {
        let run = Run { model, adapter, examples: &rows, reference: Some(&reference), plan };
        let restored = if restore { checkpoints.restore(adapter, 0.0, |_| {})? } else { None };
        let mut state = restored.unwrap_or_else(|| run.start());
        run.train(&mut state, |_, state| {
            checkpoints.save(adapter, state)?;
            Ok(if Some(state.cursor.step) == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
    };
    assert!(!run(&adapter(), Some(stop), false)?, "it was not stopped");
    let second = adapter();
    assert!(run(&second, None, true)?);
    Ok(second)
}

#[test]
fn a_run_that_was_stopped_at_any_step_ends_with_the_same_adapter_bit_for_bit() -> Result<()> {
    let model = model()?;
    let plan = plan(Requested {
        lora_dropout: Some(0.2),
        gradient_accumulation_steps: Some(2),
        batch_size: Some(2),
        ..Default::default()
    })?;
    let (whole, steps) = train(&model, &plan)?;
    for stop in 1..steps.len() as u64 {
        let folder = tempfile::tempdir()?;
        let resumed = train_with_a_stop(&model, &plan, stop, &Checkpoints::new(folder.path().into(), b"run".to_vec()))?;
        assert_eq!(whole.flat(), resumed.flat(), "stopped after step {stop}");
    }
    Ok(())
}

#[test]
fn a_torn_or_edited_checkpoint_is_passed_over_for_the_one_before_it() -> Result<()> {
    let model = model()?;
    let plan = plan(Requested { batch_size: Some(4), ..Default::default() })?;
    let fresh = || Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let spoil: [fn(&Path) -> Result<()>; 3] = [
        |newest| Ok(std::fs::File::options().write(true).open(newest.join("state.f32"))?.set_len(100)?),
        |newest| {
            let path = newest.join("checkpoint.json");
            Ok(std::fs::write(&path, std::fs::read_to_string(&path)?.replace("\"step\": 6", "\"step\": 7"))?)
        },
        |newest| Ok(std::fs::remove_file(newest.join("checkpoint.json"))?),
    ];
    for spoil in spoil {
        let folder = tempfile::tempdir()?;
        let checkpoints = Checkpoints::new(folder.path().into(), b"run".to_vec());
        train_with_a_stop(&model, &plan, 4, &checkpoints)?;
        let newest = folder.path().join("step-6");
        assert!(newest.exists() && !folder.path().join("step-4").exists(), "the newest two are kept");
        spoil(&newest)?;
        let mut said = Vec::new();
        let state = checkpoints.restore(&fresh(), 0.0, |reason| said.push(reason))?;
        assert_eq!((state.map(|s| s.cursor.step), said.len()), (Some(5), 1), "{said:?}");
    }
    let folder = tempfile::tempdir()?;
    train_with_a_stop(&model, &plan, 4, &Checkpoints::new(folder.path().into(), b"run".to_vec()))?;
    let other = Checkpoints::new(folder.path().into(), b"another run".to_vec());
    assert!(other.restore(&fresh(), 0.0, |_| {})?.is_none(), "a checkpoint of another plan was taken");
    Ok(())
}

#[test]
fn training_lowers_the_loss_and_reports_every_step() -> Result<()> {
    let model = model()?;
    let plan = plan(Requested { batch_size: Some(4), n_epochs: None, ..Default::default() })?;
    let (adapter, steps) = train(&model, &plan)?;
    assert_eq!(steps.len() as u64, Hyperparameters::total_steps(&plan.hyperparameters, 8));
    assert!(steps[steps.len() - 1].task_loss < steps[0].task_loss);
    assert!(gradient::dot(adapter.flat(), adapter.flat()).is_finite());
    Ok(())
}

#[test]
fn an_adapter_for_another_model_is_refused_by_name() -> Result<()> {
    let model = model()?;
    let folder = tempfile::tempdir()?;
    let config =
        AdapterConfig { rank: 2, alpha: 4.0, dropout: 0.0, targets: vec![holdfast_domain::hyperparameters::Projection::QProj] };
    adapter_files::write(folder.path(), &Adapter::init(&model, config, 1), "m")?;
    let mut peft: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join(adapter_files::CONFIG))?)?;
    peft["r"] = 3.into();
    std::fs::write(folder.path().join(adapter_files::CONFIG), peft.to_string())?;
    let error = adapter_files::read(folder.path(), &model).map(|_| ()).map_err(|e| e.to_string());
    assert!(error.is_err_and(|e| e.contains("q_proj.lora_A.weight has shape")));
    Ok(())
}
