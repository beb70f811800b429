//! `s3-server FOLDER [PORT]`: an S3 server over a folder, whose folders are its buckets. It knows one key, `holdfast` with the
//! secret `holdfast-secret`, and checks signatures. For tests and benches.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use holdfast_tests::stored_as;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput, CompleteMultipartUploadOutput,
    CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectsInput, DeleteObjectsOutput, GetObjectInput,
    GetObjectOutput, HeadObjectInput, HeadObjectOutput, PutObjectInput, PutObjectOutput, UploadPartInput, UploadPartOutput,
};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;

#[tokio::main]
async fn main() -> ExitCode {
    match serve().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("s3-server: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().context("usage: s3-server FOLDER [PORT]")?;
    let port = arguments.next().map_or(Ok(0), |port| port.parse()).context("PORT is a number up to 65535")?;
    let files = FileSystem::new(&folder).map_err(|error| anyhow!("cannot serve {folder}: {error:?}"))?;
    let mut service = S3ServiceBuilder::new(ShortNames(files, folder.into()));
    service.set_auth(SimpleAuth::from_single("holdfast", "holdfast-secret"));
    let service = service.build();
    let listener = TcpListener::bind(("127.0.0.1", port)).await.with_context(|| format!("cannot listen on port {port}"))?;
    println!("listening on http://{}", listener.local_addr()?);
    loop {
        let (connection, _) = listener.accept().await?;
        let service = service.clone();
        // A connection that breaks is its client's matter.
        tokio::spawn(async move {
            let server = Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(connection), service).await;
        });
    }
}

/// S3 takes keys of 1,024 bytes; the file system below makes one file name of a key, which ends at 130. What Holdfast asks of a
/// store is passed on under names that fit. And it makes buckets that are not there, which S3 does not.
struct ShortNames(FileSystem, PathBuf);

impl ShortNames {
    fn must_be_there(&self, bucket: &str) -> S3Result<()> {
        if self.1.join(bucket).is_dir() { Ok(()) } else { Err(s3_error!(NoSuchBucket)) }
    }
}

/// The request under the name that fits.
macro_rules! short {
    ($request:expr) => {
        $request.map_input(|mut input| {
            input.key = stored_as(&input.key);
            input
        })
    };
}

#[async_trait::async_trait]
impl S3 for ShortNames {
    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        self.0.get_object(short!(request)).await
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        self.0.head_object(short!(request)).await
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        self.must_be_there(&request.input.bucket)?;
        self.0.put_object(short!(request)).await
    }

    async fn delete_objects(&self, mut request: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        for object in &mut request.input.delete.objects {
            object.key = stored_as(&object.key);
        }
        self.0.delete_objects(request).await
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.0.create_multipart_upload(short!(request)).await
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.0.upload_part(short!(request)).await
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.0.complete_multipart_upload(short!(request)).await
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.0.abort_multipart_upload(short!(request)).await
    }
}
