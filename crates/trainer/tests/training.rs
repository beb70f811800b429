//! What holds of training whatever the numbers are, on the small reference model.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_dataset::Example;
use holdfast_dataset::batch::Batch;
use holdfast_domain::hyperparameters::{Precision, Recompute, Requested};
use holdfast_domain::plan::{self, paths};
use holdfast_domain::progress::{Review, Step};
use holdfast_domain::safety::{AlignmentPoint, Defense, KlPositions, ProjectionOf, ProjectionSpace};
use holdfast_domain::{Hyperparameters, Plan, Safety};
use holdfast_trainer::adapter::{Adapter, AdapterConfig};
use holdfast_trainer::checkpoint::{Checkpoints, Owed, State};
use holdfast_trainer::divergence::Diverged;
use holdfast_trainer::methods::Objective;
use holdfast_trainer::model::Model;
use holdfast_trainer::objective::{AlignmentRows, Engine};
use holdfast_trainer::reference::Reference;
use holdfast_trainer::stop::{Stop, Stopped};
use holdfast_trainer::train::Run;
use holdfast_trainer::{adapter_files, device, evaluate, gradient};
use tch::{Device, Kind, Tensor};

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2")
}

fn model() -> Result<Model> {
    model_of(Kind::Float)
}

fn model_of(kind: Kind) -> Result<Model> {
    // Tests run side by side, and a model this small has no work for two.
    tch::set_num_threads(1);
    Model::load(&fixture(), kind, Device::Cpu)
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
    let (learning_rate, n_epochs) = (more.learning_rate.or(Some(1e-2)), more.n_epochs.or(Some(3)));
    let requested = Requested { precision: Some(Precision::F32), learning_rate, n_epochs, ..more };
    Ok(Plan {
        format: plan::FORMAT,
        base_model: "m".into(),
        validation: false,
        hyperparameters: requested.resolve(8, None)?,
        safety: Safety::new(Defense::Safegrad, 1.0),
        start: None,
        seed: 5,
        checkpoint_steps: 100,
        framed_alignment_sha256: None,
        reference: None,
        memory_limit_bytes: None,
        device: "cpu".into(),
    })
}

/// The alignment rows, and those kept apart where the method reviews its steps.
fn references(model: &Model, plan: &Plan) -> Result<(Reference, Option<Reference>)> {
    let whole = Reference::new(model, examples(10), KlPositions::Response, &Stop::default())?;
    if plan.safety.defense != Defense::Held {
        return Ok((whole, None));
    }
    let (training, probe) = whole.split(5).context("enough rows")?;
    Ok((training, Some(probe)))
}

fn train(model: &Model, plan: &Plan) -> Result<(Adapter, Vec<Step>)> {
    let (rows, (reference, probe)) = (examples(8), references(model, plan)?);
    let adapter = Adapter::init(model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let mut steps = Vec::new();
    let run = Run {
        model,
        adapter: &adapter,
        examples: &rows,
        reference: Some(&reference),
        probe: probe.as_ref(),
        plan,
        stop: &Stop::default(),
    };
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
fn how_a_step_is_cut_into_passes_makes_no_difference_also_with_dropout() -> Result<()> {
    let model = model()?;
    let mut adapter = adapter_files::read(&fixture(), &model)?;
    let rows = examples(6);
    let reference = Reference::new(&model, rows.clone(), KlPositions::Response, &Stop::default())?;
    let cut = |per_pass: usize| rows.chunks(per_pass).map(Batch::new).collect::<Vec<_>>();
    for dropout in [0.0, 0.3] {
        adapter.config.dropout = dropout;
        let engine = Engine { model: &model, adapter: &adapter, dropout_key: Some(7), recompute: Recompute::Nothing };
        let both = |per_pass: usize, passes: &[Vec<usize>]| {
            let rows = AlignmentRows { reference: &reference, objective: Objective::Kl, passes };
            engine.gradients(&cut(per_pass), Some(rows))
        };
        let (whole, whole_align) = both(6, &[(0..6).collect()]);
        let (parts, parts_align) = both(2, &[vec![0, 1, 2], vec![3], vec![4, 5]]);
        let (whole_align, parts_align) = (whole_align.expect("a"), parts_align.expect("a"));
        assert!((whole.side.loss - parts.side.loss).abs() < 1e-6);
        assert!(largest_difference(&whole.side.gradient.0, &parts.side.gradient.0) < 1e-5);
        assert!((whole_align.loss - parts_align.loss).abs() < 1e-6);
        assert!(largest_difference(&whole_align.gradient.0, &parts_align.gradient.0) < 1e-5);
    }
    Ok(())
}

#[test]
fn the_worse_half_of_a_step_s_alignment_rows_is_that_of_all_its_passes() -> Result<()> {
    let model = model()?;
    let adapter = adapter_files::read(&fixture(), &model)?;
    let reference = Reference::new(&model, examples(6), KlPositions::Deciding, &Stop::default())?;
    let engine = Engine { model: &model, adapter: &adapter, dropout_key: None, recompute: Recompute::Nothing };
    let of = |passes: &[Vec<usize>]| -> Result<(f64, f64, Tensor)> {
        let rows = AlignmentRows { reference: &reference, objective: Objective::WeightedKl, passes };
        let side = engine.alignment(rows);
        Ok((side.loss, engine.alignment_loss(rows, &Stop::default())?, side.gradient.0))
    };
    let (loss, alone, gradient) = of(&[(0..6).collect()])?;
    assert!((loss - alone).abs() < 1e-6);
    for passes in [vec![vec![0, 1, 2], vec![3], vec![4, 5]], (0..6).map(|row| vec![row]).collect()] {
        let (of_parts, alone_of_parts, gradient_of_parts) = of(&passes)?;
        assert!((loss - of_parts).abs() < 1e-6 && (loss - alone_of_parts).abs() < 1e-6, "{passes:?}");
        assert!(largest_difference(&gradient, &gradient_of_parts) < 1e-5, "{passes:?}");
    }
    Ok(())
}

#[test]
fn what_is_computed_again_instead_of_kept_makes_no_difference() -> Result<()> {
    let model = model()?;
    let mut adapter = adapter_files::read(&fixture(), &model)?;
    adapter.config.dropout = 0.3;
    let gradient = |recompute| {
        let engine = Engine { model: &model, adapter: &adapter, dropout_key: Some(7), recompute };
        engine.task(&[Batch::new(&examples(6))]).side.gradient.0
    };
    let kept = gradient(Recompute::Nothing);
    assert_eq!(kept, gradient(Recompute::FeedForward));
    assert_eq!(kept, gradient(Recompute::Layers));
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
    let (rows, (reference, probe), first_kept) = (examples(8), references(model, plan)?, stop);
    let fresh = || Adapter::init(model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let go = |adapter: &Adapter, stop: Option<u64>| -> Result<bool> {
        let run = Run {
            model,
            adapter,
            examples: &rows,
            reference: Some(&reference),
            probe: probe.as_ref(),
            plan,
            stop: &Stop::default(),
        };
        let mut state = run.start();
        checkpoints.restore(model, adapter, &mut state, |_| {})?;
        run.train(&mut state, |_, state| {
            if state.cursor.step >= first_kept {
                checkpoints.save(adapter, state)?;
            }
            Ok(if Some(state.cursor.step) == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
    };
    assert!(!go(&fresh(), Some(stop))?, "it was not stopped");
    let second = fresh();
    assert!(go(&second, None)?);
    Ok(second)
}

fn checkpoints(folder: &Path) -> Checkpoints {
    Checkpoints::new(folder.into(), b"run".to_vec(), "m", 1)
}

/// With dropout and accumulation, whose randomness and sums a stop must not disturb.
fn hard_to_resume() -> Result<Plan> {
    plan(Requested { lora_dropout: Some(0.2), gradient_accumulation_steps: Some(2), batch_size: Some(2), ..Default::default() })
}

#[test]
fn a_run_that_was_stopped_at_any_step_ends_with_the_same_adapter_bit_for_bit() -> Result<()> {
    let (model, plan) = (model()?, hard_to_resume()?);
    let (whole, steps) = train(&model, &plan)?;
    for stop in 1..steps.len() as u64 {
        let folder = tempfile::tempdir()?;
        let resumed = train_with_a_stop(&model, &plan, stop, &checkpoints(folder.path()))?;
        assert_eq!(whole.flat(), resumed.flat(), "stopped after step {stop}");
    }
    Ok(())
}

#[test]
fn what_a_method_remembers_survives_a_stop_too() -> Result<()> {
    let model = model()?;
    for defense in Defense::ALL.into_iter().filter(|defense| defense.needs_alignment()) {
        let mut plan = hard_to_resume()?;
        plan.safety = Safety::new(defense, 1.0);
        // Small enough for `held` to go back in the middle of it.
        plan.safety.budget = 1e-3;
        plan.hyperparameters.row_conflicts = defense.compares_gradients();
        let (whole, steps) = train(&model, &plan)?;
        let (folder, stop) = (tempfile::tempdir()?, steps.len() as u64 - 2);
        let resumed = train_with_a_stop(&model, &plan, stop, &checkpoints(folder.path()))?;
        assert_eq!(whole.flat(), resumed.flat(), "{defense:?}");
    }
    Ok(())
}

#[test]
fn what_a_stop_breaks_off_between_two_steps_is_made_up_for() -> Result<()> {
    let model = model()?;
    let more = Requested { batch_size: Some(4), n_epochs: Some(8), row_conflicts: Some(true), ..Default::default() };
    let mut plan = plan(more)?;
    plan.safety = Safety { budget: 1e-3, ..Safety::new(Defense::Held, 1.0) };
    let (rows, (reference, probe)) = (examples(8), references(&model, &plan)?);
    // Asked to stop while step 11, 13 or 15 is taken, the run comes to the scores and the review that follow the next one, an epoch's last,
    // and of the third the run's.
    let train = |asked_at: Option<u64>, checkpoints: &Checkpoints| -> Result<(Tensor, State, BTreeMap<u64, Review>)> {
        let (stop, mut reviews) = (Stop::default(), BTreeMap::new());
        let adapter = Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
        let (reference, probe, examples) = (Some(&reference), probe.as_ref(), rows.as_slice());
        let run = Run { model: &model, adapter: &adapter, examples, reference, probe, plan: &plan, stop: &stop };
        let mut state = run.start();
        if checkpoints.restore(&model, &adapter, &mut state, |_| {})? {
            run.settle(&mut state);
            reviews.extend(state.reviews.drain(..).map(|review| (review.step, review)));
        }
        run.train(&mut state, |step, state| {
            reviews.extend(step.reviews.iter().map(|review| (review.step, *review)));
            if Some(step.step) == asked_at {
                stop.ask();
            } else if stop.is_asked() {
                checkpoints.save(&adapter, state)?;
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((adapter.flat().copy(), state, reviews))
    };
    let folder = tempfile::tempdir()?;
    let scores = |state: State| state.conflicts.map(|scores| scores.memory());
    let (whole, state, whole_reviews) = train(None, &checkpoints(&folder.path().join("none")))?;
    let whole_scores = scores(state);
    ensure!(whole_reviews.values().any(|review| review.taken_back), "a budget that is never left: {whole_reviews:?}");
    for asked_at in [11, 13, 15] {
        let checkpoints = checkpoints(&folder.path().join(asked_at.to_string()));
        let (_, stopped, mut told) = train(Some(asked_at), &checkpoints)?;
        assert_eq!(stopped.cursor.owed, Some(Owed::Scores));
        let (resumed, state, reviews) = train(None, &checkpoints)?;
        assert_eq!((&whole, &whole_scores), (&resumed, &scores(state)), "asked to stop at step {asked_at}");
        told.extend(reviews);
        assert_eq!(told, whole_reviews, "a review that came after a stop is made of the same step");
    }
    Ok(())
}

#[test]
fn a_step_takes_as_many_alignment_rows_as_the_plan_says() -> Result<()> {
    let model = model()?;
    let trained = |rows: Option<u32>| -> Result<Tensor> {
        let mut plan = plan(Requested { batch_size: Some(2), ..Default::default() })?;
        plan.safety.alignment_batch_size = rows;
        Ok(train(&model, &plan)?.0.flat().copy())
    };
    let as_many_as_its_own = trained(None)?;
    assert_eq!(trained(Some(2))?, as_many_as_its_own);
    assert_ne!(trained(Some(1))?, as_many_as_its_own);
    assert_ne!(trained(Some(5))?, as_many_as_its_own, "more than fit one pass");
    Ok(())
}

#[test]
fn a_pass_over_a_file_ends_early_when_it_is_asked_to() -> Result<()> {
    let (model, stop) = (model()?, Stop::default());
    stop.ask();
    assert_eq!(Reference::new(&model, examples(8), KlPositions::Response, &stop).err(), Some(Stopped));
    assert_eq!(evaluate::evaluate(&model, None, &examples(8), 4, &stop), Err(Stopped));
    Ok(())
}

#[test]
fn every_variant_of_a_run_survives_a_stop_bit_for_bit() -> Result<()> {
    let variants: [fn(&mut Plan); 6] = [
        |plan| plan.hyperparameters.precision = Precision::Bf16,
        |plan| plan.hyperparameters.length_grouping = true,
        |plan| plan.hyperparameters.activation_checkpointing = Recompute::Layers,
        |plan| plan.safety.projection = ProjectionOf::PerRow,
        |plan| plan.safety.projection_space = ProjectionSpace::Update,
        |plan| plan.safety.alignment_point = AlignmentPoint::Lookahead,
    ];
    for (at, vary) in variants.into_iter().enumerate() {
        let mut plan = hard_to_resume()?;
        vary(&mut plan);
        let model = model_of(device::kind(plan.hyperparameters.precision))?;
        let (whole, _) = train(&model, &plan)?;
        let folder = tempfile::tempdir()?;
        let resumed = train_with_a_stop(&model, &plan, 3, &checkpoints(folder.path()))?;
        assert_eq!(whole.flat(), resumed.flat(), "variant {at}");
    }
    Ok(())
}

#[test]
fn variants_of_the_projection_train_and_differ() -> Result<()> {
    let (model, plain) = (model()?, hard_to_resume()?);
    let with = |change: fn(&mut Safety)| -> Result<Tensor> {
        let mut plan = plain.clone();
        change(&mut plan.safety);
        Ok(train(&model, &plan)?.0.flat().copy())
    };
    let adapters = [
        with(|_| {})?,
        with(|safety| safety.projection = ProjectionOf::PerRow)?,
        with(|safety| safety.projection_space = ProjectionSpace::Update)?,
        with(|safety| safety.alignment_point = AlignmentPoint::Lookahead)?,
    ];
    for (at, adapter) in adapters.iter().enumerate() {
        assert!(adapter.sum(Kind::Double).double_value(&[]).is_finite());
        assert!(adapters[..at].iter().all(|other| largest_difference(adapter, other) > 0.0), "variant {at}");
    }
    Ok(())
}

#[test]
fn rows_add_up_to_the_step_and_their_gradients_to_its_gradient() -> Result<()> {
    let model = model()?;
    let adapter = adapter_files::read(&fixture(), &model)?;
    let engine = Engine { model: &model, adapter: &adapter, dropout_key: None, recompute: Recompute::Nothing };
    let batches: Vec<Batch> = examples(5).chunks(2).map(Batch::new).collect();
    let mut rows = Vec::new();
    let by_row = engine.task_by_row(&batches, |row, gradient| rows.push((row, gradient.0.copy())));
    let whole = engine.task(&batches);
    assert_eq!(rows.iter().map(|(row, _)| *row).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
    let sum = rows.iter().fold(whole.side.gradient.0.zeros_like(), |sum, (_, gradient)| sum + gradient);
    assert!(largest_difference(&whole.side.gradient.0, &sum) < 1e-5);
    assert!(largest_difference(&whole.side.gradient.0, &by_row.side.gradient.0) < 1e-5);
    Ok(())
}

#[test]
fn a_run_that_leaves_its_budget_goes_back_and_stays_within_it() -> Result<()> {
    let model = model()?;
    let mut plan = plan(Requested { n_epochs: Some(20), batch_size: Some(4), learning_rate: Some(0.05), ..Default::default() })?;
    plan.safety = Safety { budget: 1e-3, ..Safety::new(Defense::Held, 1.0) };
    let (adapter, steps) = train(&model, &plan)?;
    assert!(steps.iter().any(|step| step.alignment.as_ref().is_some_and(|a| a.align_kl > 2e-3)), "it never left");
    let (_, probe) = references(&model, &plan)?;
    let probe = probe.expect("rows kept apart");
    let engine = Engine { model: &model, adapter: &adapter, dropout_key: None, recompute: Recompute::Nothing };
    let passes = [(0..probe.rows()).collect::<Vec<_>>()];
    let rows = AlignmentRows { reference: &probe, objective: Objective::WeightedKl, passes: &passes };
    assert!(engine.alignment_loss(rows, &Stop::default())? <= 2e-3);
    Ok(())
}

#[test]
fn a_row_that_is_trained_against_the_alignment_scores_below_the_others() -> Result<()> {
    let model = model()?;
    let mut plan = plan(Requested { n_epochs: Some(12), batch_size: Some(4), row_conflicts: Some(true), ..Default::default() })?;
    plan.safety = Safety::new(Defense::KlPenalty, 1.0);
    // Row 3 answers an alignment prompt with something else than the base would.
    let (alignment, mut rows) = (examples(9).split_off(8), examples(8));
    let mut planted = alignment[0].clone();
    for (id, supervised) in planted.ids.iter_mut().zip(&planted.supervised) {
        if *supervised {
            *id = (*id + 61) % 150;
        }
    }
    rows[3] = planted;
    let reference = Reference::new(&model, alignment, KlPositions::Response, &Stop::default())?;
    let adapter = Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let run = Run {
        model: &model,
        adapter: &adapter,
        examples: &rows,
        reference: Some(&reference),
        probe: None,
        plan: &plan,
        stop: &Stop::default(),
    };
    let mut state = run.start();
    run.train(&mut state, |_, _| Ok(ControlFlow::Continue(())))?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("row_conflicts.jsonl");
    state.conflicts.expect("scores").write(&path, &[1, 2, 3, 5, 6, 7, 8, 9])?;
    let scores: Vec<serde_json::Value> =
        std::fs::read_to_string(&path)?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let of = |row: &serde_json::Value, way: &str| row[way].as_f64().expect("a score");
    let worst = scores.iter().min_by(|x, y| of(x, "gradient").total_cmp(&of(y, "gradient"))).expect("rows");
    assert_eq!(worst["line"], 5, "{scores:?}");
    // The forward pass sees the rows' own lengths of gradient too, so it may rank a louder row lower; the sign is the same.
    assert!(of(worst, "forward") < 0.0, "{scores:?}");
    Ok(())
}

#[test]
fn a_torn_or_edited_checkpoint_is_passed_over_for_the_one_before_it() -> Result<()> {
    let model = model()?;
    let plan = plan(Requested { batch_size: Some(4), ..Default::default() })?;
    let fresh = || Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let rows = examples(8);
    let restore = |checkpoints: &Checkpoints, said: &mut Vec<String>| -> Result<(bool, u64)> {
        let (adapter, (reference, _)) = (fresh(), references(&model, &plan)?);
        let run = Run {
            model: &model,
            adapter: &adapter,
            examples: &rows,
            reference: Some(&reference),
            probe: None,
            plan: &plan,
            stop: &Stop::default(),
        };
        let mut state = run.start();
        let restored = checkpoints.restore(&model, &adapter, &mut state, |reason| said.push(reason))?;
        Ok((restored, state.cursor.step))
    };
    let spoil: [fn(&Path) -> Result<()>; 4] = [
        |newest| Ok(std::fs::File::options().write(true).open(newest.join("state.safetensors"))?.set_len(100)?),
        |newest| Ok(std::fs::File::options().write(true).open(newest.join("adapter_model.safetensors"))?.set_len(900)?),
        |newest| {
            let path = newest.join("checkpoint.json");
            Ok(std::fs::write(&path, std::fs::read_to_string(&path)?.replace("\"step\": 6", "\"step\": 7"))?)
        },
        |newest| Ok(std::fs::remove_file(newest.join("checkpoint.json"))?),
    ];
    for spoil in spoil {
        let folder = tempfile::tempdir()?;
        train_with_a_stop(&model, &plan, 4, &checkpoints(folder.path()))?;
        let newest = folder.path().join("step-6");
        assert!(newest.exists() && !folder.path().join("step-4").exists(), "the newest two are kept");
        spoil(&newest)?;
        let mut said = Vec::new();
        assert_eq!(restore(&checkpoints(folder.path()), &mut said)?, (true, 5), "{said:?}");
        assert_eq!(said.len(), 1, "{said:?}");
    }
    let folder = tempfile::tempdir()?;
    train_with_a_stop(&model, &plan, 4, &checkpoints(folder.path()))?;
    let other = Checkpoints::new(folder.path().into(), b"another run".to_vec(), "m", 1);
    assert!(!restore(&other, &mut Vec::new())?.0, "a checkpoint of another plan was taken");
    Ok(())
}

#[test]
fn the_best_adapters_that_checkpoints_name_stay_and_are_held_to_their_hashes() -> Result<()> {
    let (model, plan, rows) = (model()?, plan(Requested::default())?, examples(8));
    let adapter = Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let run = Run {
        model: &model,
        adapter: &adapter,
        examples: &rows,
        reference: None,
        probe: None,
        plan: &plan,
        stop: &Stop::default(),
    };
    let folder = tempfile::tempdir()?;
    let (checkpoints, mut state) = (checkpoints(folder.path()), run.start());
    for step in 1..=4 {
        state.cursor.step = step;
        state.cursor.best = Some(checkpoints.save_best(&adapter, step, 1.0 / step as f64)?);
        if step <= 2 {
            checkpoints.save(&adapter, &state)?;
        }
    }
    let best = |step: u64| folder.path().join(format!("best-{step}"));
    assert_eq!([1, 2, 3, 4].map(|step| best(step).exists()), [true, true, false, true]);

    std::fs::write(best(2).join("adapter_config.json"), "{}")?;
    let mut said = Vec::new();
    assert!(checkpoints.restore(&model, &adapter, &mut state, |reason| said.push(reason))?);
    assert_eq!(state.cursor.step, 1, "{said:?}");
    assert!(said.iter().any(|reason| reason.contains("best-2, is torn or was edited")), "{said:?}");
    Ok(())
}

#[test]
fn a_run_whose_loss_is_no_number_says_at_which_step() -> Result<()> {
    let (model, plan) = (model()?, hard_to_resume()?);
    let (rows, (reference, _)) = (examples(8), references(&model, &plan)?);
    let adapter = Adapter::init(&model, AdapterConfig::from(&plan.hyperparameters), plan.seed);
    let run = Run {
        model: &model,
        adapter: &adapter,
        examples: &rows,
        reference: Some(&reference),
        probe: None,
        plan: &plan,
        stop: &Stop::default(),
    };
    let outcome = run.train(&mut run.start(), |step, _| {
        if step.step == 2 {
            adapter.set(&adapter.flat().full_like(f64::NAN));
        }
        Ok(ControlFlow::Continue(()))
    });
    let error = outcome.expect_err("it went on");
    assert_eq!(error.downcast_ref::<Diverged>(), Some(&Diverged::NotANumber { step: 3 }));
    Ok(())
}

#[test]
fn training_lowers_the_loss_and_reports_every_step() -> Result<()> {
    let model = model()?;
    let plan = plan(Requested { batch_size: Some(4), ..Default::default() })?;
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
    let mut peft: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join(paths::ADAPTER_CONFIG))?)?;
    peft["r"] = 3.into();
    std::fs::write(folder.path().join(paths::ADAPTER_CONFIG), peft.to_string())?;
    let error = adapter_files::read(folder.path(), &model).map(|_| ()).map_err(|e| e.to_string());
    assert!(error.is_err_and(|e| e.contains("q_proj.lora_A.weight has shape")));
    Ok(())
}
