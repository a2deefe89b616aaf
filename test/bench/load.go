// The loads: fio, nbdcopy, dd and cp, and the files they work on.

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// load is what fio does to an export.
type load struct {
	rw    string // as fio calls it
	block int64  // bytes a request
	depth int    // requests in flight, on each connection
	jobs  int    // connections; 0 is one
	iops  int    // requests a second at most; 0: as many as it can

	// total is how many bytes are moved, no block twice; 0: as long as loads
	// last. The part of the export that is used is the first size bytes, or
	// as much as the origin of the bench has.
	total, size int64
	anywhere    bool // blocks are chosen freely, in so many that none comes twice
	forever     bool // until it is stopped
	half        bool // half of the origin, no block twice
	short       bool // half a second
	long        bool // so long that the change map is written down meanwhile
}

// fioResult is what is used of fio's JSON.
type fioResult struct {
	Jobs []struct {
		Error       int
		Read, Write struct {
			Iops float64
			Bw   float64 `json:"bw_bytes"`
		}
	}
}

// command is the fio that puts the load on an export.
func (l load) command(b *bench, uri string) *exec.Cmd {
	args := []string{"--name=load", "--ioengine=nbd", "--uri=" + uri, "--rw=" + l.rw,
		fmt.Sprint("--bs=", l.block), fmt.Sprint("--size=", cmp.Or(l.size, b.size)), fmt.Sprint("--iodepth=", l.depth),
		fmt.Sprint("--numjobs=", max(l.jobs, 1)), "--group_reporting", "--output-format=json",
		fmt.Sprint("--randseed=", rand.Uint32())}
	switch {
	case l.forever:
		args = append(args, "--time_based", "--runtime=1d")
	case l.half:
		args = append(args, fmt.Sprint("--io_size=", b.size/2))
	case l.total > 0:
		args = append(args, fmt.Sprint("--io_size=", min(l.total, b.size)))
	default:
		last := b.load
		switch {
		case l.short:
			last = 500 * time.Millisecond
		case l.long:
			last *= 25
		}
		args = append(args, "--time_based", fmt.Sprint("--runtime=", last.Milliseconds(), "ms"), "--ramp_time=200ms")
	}
	if l.iops > 0 {
		args = append(args, fmt.Sprint("--rate_iops=", l.iops))
	}
	if l.anywhere {
		args = append(args, "--norandommap")
	}
	cmd := exec.CommandContext(b.ctx, "fio", args...)
	cmd.Dir = b.work // fio leaves files
	return cmd
}

// put puts the load on a server's live export and returns the rate: requests a
// second for small blocks, bytes a second for large ones.
func (l load) put(s *server) (float64, error) {
	return l.putOn(s.b, s.uri(s.live))
}

func (l load) putOn(b *bench, uri string) (float64, error) {
	out, err := output(l.command(b, uri))
	if err != nil {
		return 0, err
	}
	return l.rate(out)
}

func (l load) rate(out []byte) (float64, error) {
	var res fioResult
	at := max(bytes.IndexByte(out, '{'), 0) // fio may say something first
	if err := json.Unmarshal(out[at:], &res); err != nil || len(res.Jobs) == 0 {
		return 0, fmt.Errorf("fio printed %q: %w", out, err)
	}
	job := res.Jobs[0]
	if job.Error != 0 {
		return 0, fmt.Errorf("fio reports error %d", job.Error)
	}
	did := job.Read
	if strings.Contains(l.rw, "write") {
		did = job.Write
	}
	if l.block >= 64<<10 {
		return did.Bw, nil
	}
	return did.Iops, nil
}

// output is cmd.Output with what the command said in the error.
func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil, fmt.Errorf("%s: %w: %s", cmd.Args[0], err, exit.Stderr)
	}
	return out, err
}

// throughput runs a command that moves n bytes and returns bytes a second.
func (b *bench) throughput(n int64, name string, args ...string) (float64, error) {
	begun := time.Now()
	if _, err := output(exec.CommandContext(b.ctx, name, args...)); err != nil {
		return 0, err
	}
	return float64(n) / time.Since(begun).Seconds(), nil
}

// makeRandom makes a file of n bytes that no file system compresses.
func makeRandom(path string, n int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.CopyN(f, rand.NewChaCha8([32]byte{}), n); err != nil {
		return err
	}
	return f.Sync()
}

func makeSparse(path string, n int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(n), f.Close())
}

// warm reads a file, so that it is in the page cache.
func warm(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(struct{ io.Writer }{io.Discard}, f)
	return err
}

// cold makes the page cache forget a file.
func cold(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

// syncFiles waits until everything is on the disk in the file system of path.
func syncFiles(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// onDisk is how many bytes a file takes up.
func onDisk(path string) (float64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, err
	}
	return float64(st.Blocks * 512), nil
}
