package fusefs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// fileImage is an image whose bytes are those of a file.
type fileImage struct {
	fakeImage
	file *os.File
	size int64
}

func (im *fileImage) ReadAt(p []byte, off int64) (int, error) { return im.file.ReadAt(p, off) }
func (im *fileImage) Size() int64                             { return im.size }
func (im *fileImage) Allocated() (int64, error)               { return im.size, nil }
func (im *fileImage) NextData(off int64) (int64, error)       { return off, nil }
func (im *fileImage) NextHole(off int64) (int64, error)       { return im.size, nil }

// fileSnapshot is a snapshot of one fileImage.
type fileSnapshot struct {
	fakeSnapshot
	image *fileImage
}

func (s *fileSnapshot) Images() []string             { return []string{"vda"} }
func (s *fileSnapshot) Image(d string) (Image, bool) { return s.image, d == "vda" }

// fileSource has one such snapshot, "one".
type fileSource struct {
	*fakeSource
	snap *fileSnapshot
}

func (s *fileSource) Snapshots() []string { return []string{"one"} }

func (s *fileSource) Snapshot(name string) (Snapshot, bool) { return s.snap, name == "one" }

// BenchmarkImage reads an image whose bytes are in a file in the page cache, and
// that file itself, in turn, and reports the rate of the image in MB/s and as a
// ratio of that of the file.
func BenchmarkImage(b *testing.B) {
	const size = 512 << 20
	plain := filepath.Join(b.TempDir(), "plain")
	if err := os.WriteFile(plain, bytes.Repeat([]byte("blksnap\n"), size/8), 0o600); err != nil {
		b.Fatal(err)
	}
	file, err := os.Open(plain)
	if err != nil {
		b.Fatal(err)
	}
	defer file.Close()
	src := &fileSource{newFakeSource(), &fileSnapshot{image: &fileImage{file: file, size: size}}}
	_, dir := mountSource(b, src)
	image := filepath.Join(dir, "snapshots/one/vda.img")
	shm, err := os.MkdirTemp("/dev/shm", "fusefs")
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(shm)

	for _, bc := range []struct {
		name, command string
		bytes         int64
	}{
		{"dd 1M", "dd if=%s of=/dev/null bs=1M status=none", size},
		{"dd 128K", "dd if=%s of=/dev/null bs=128K status=none", size},
		{"dd 4K", fmt.Sprintf("dd if=%%s of=/dev/null bs=4K count=%d status=none", size/8/4096), size / 8},
		{"cp to tmpfs", "cp %s " + shm + "/copy", size},
	} {
		b.Run(bc.name, func(b *testing.B) {
			took := func(name string) time.Duration {
				start := time.Now()
				run(b, "/", bc.command, name)
				return time.Since(start)
			}
			took(plain) // warms up the cache and the memory of the copy
			b.SetBytes(bc.bytes)
			b.ResetTimer()
			var ofImage, ofPlain time.Duration
			for b.Loop() {
				ofImage += took(image)
				b.StopTimer()
				ofPlain += took(plain)
				b.StartTimer()
			}
			b.ReportMetric(float64(ofPlain)/float64(ofImage), "of-the-file")
		})
	}
}
