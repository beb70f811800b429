//! Builds the CPU kernels, and lets the trainer and its tests find libtorch without `LD_LIBRARY_PATH`: first beside the
//! program, as an installation lays it out, then where it was built.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        let folder = std::path::Path::new(&libtorch).join("lib");
        // Resolved, because libtorch finds its own neighbours relative to the place it was loaded from.
        let folder = folder.canonicalize().unwrap_or(folder);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
    build_kernels();
}

/// Compiles `cpu.cpp` once for each instruction set it may meet; the program picks one when it starts.
fn build_kernels() {
    const SOURCE: &str = "src/kernels/cpu.cpp";
    println!("cargo:rerun-if-changed={SOURCE}");
    let mut variants: Vec<(&str, &[&str])> = vec![("baseline", &[])];
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
        variants.push(("avx2", &["-march=x86-64-v3"]));
        variants.push(("avx512", &["-march=x86-64-v4", "-mprefer-vector-width=512"]));
    }
    for (name, flags) in variants {
        let mut build = cc::Build::new();
        build.cpp(true).std("c++17").opt_level(3).file(SOURCE);
        // Each operation rounds by itself, as in the reference implementations: fusing a product into a sum would save little
        // here, where memory is what costs.
        build.flag("-ffp-contract=off");
        // Sums are reordered only where the code says so; errno and floating-point traps nobody reads.
        build.flag("-Wno-psabi").flag("-fopenmp").flag("-fno-math-errno").flag("-fno-trapping-math");
        build.define("HOLDFAST_KERNELS", format!("holdfast_kernels_{name}").as_str());
        for flag in flags {
            build.flag(flag);
        }
        build.compile(&format!("holdfast_kernels_{name}"));
    }
    // libtorch brings the same OpenMP, so both share one pool of threads.
    println!("cargo:rustc-link-lib=gomp");
}
