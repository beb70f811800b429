//! Prints the contract as YAML, for `cargo xtask openapi`.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    print!("{}", holdfast_api::openapi().to_yaml()?);
    Ok(())
}
