//! Lets the trainer and its tests find libtorch without `LD_LIBRARY_PATH`: first beside the program, as an installation lays
//! it out, then where it was built.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        let folder = std::path::Path::new(&libtorch).join("lib");
        // Resolved, because libtorch finds its own neighbours relative to the place it was loaded from.
        let folder = folder.canonicalize().unwrap_or(folder);
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", folder.display());
    }
}
