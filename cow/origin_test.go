package cow

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOriginRefused(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(os.Mkdir(at("directory"), 0o700), unix.Mkfifo(at("pipe"), 0o600), os.Symlink(at("nowhere"), at("dangling"))); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", at("socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tc := range []struct {
		name, path, why string
		errno           error
	}{
		{"missing", at("nothing"), "no such file", syscall.ENOENT},
		{"a link to nothing", at("dangling"), "no such file", syscall.ENOENT},
		{"below a file", newFile(t, dir, 512) + "/x", "not a directory", syscall.ENOTDIR},
		{"a directory", at("directory"), "is a directory", nil},
		{"a pipe", at("pipe"), "neither a regular file nor a block device", nil},
		{"a socket", at("socket"), "neither a regular file nor a block device", nil},
		{"a character device", "/dev/zero", "neither a regular file nor a block device", nil},
		{"empty", newFile(t, dir, 0), "is empty", nil},
		{"less than a sector", newFile(t, dir, 511), "is 511 bytes long, not a multiple of 512", nil},
		{"not a multiple of a sector", newFile(t, dir, 1<<20+1), "is 1048577 bytes long, not a multiple of 512", nil},
	} {
		t.Run(tc.name, func(t *testing.T) { wantRefused(t, tc.path, tc.why, tc.errno) })
	}
}

func TestOriginWithoutPermission(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("", "cow-test-") // that others may enter
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := newFile(t, dir, 1<<20)
	for _, tc := range []struct {
		name string
		mode os.FileMode
		want string
	}{
		{"none", 0o600, "origin " + path + ": permission denied"},
		{"to read only", 0o644, "origin " + path + ": permission denied"},
		{"to read and write", 0o666, "<nil>"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := os.Chmod(path, tc.mode); err != nil {
				t.Fatal(err)
			}
			said, end := start(t, "nobody", path)
			defer end()
			if got := strings.Join(said, "\n"); got != tc.want {
				t.Errorf("opened by nobody\n got %s\nwant %s", got, tc.want)
			}
		})
	}
}

// TestOriginLeftAsItWas checks that refusing an origin changes nothing of it.
func TestOriginLeftAsItWas(t *testing.T) {
	path := filepath.Join(t.TempDir(), "odd.img")
	want := bytes.Repeat([]byte("odd"), 1000)
	if err := os.WriteFile(path, want, 0o400); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, path, "not a multiple", nil)
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("its content changed (%v)", err)
	}
	if err := os.Truncate(path, 2560); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, path) // no lock was left
}

func TestOriginOpens(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int64{512, 4096, 1<<20 + 512} {
		path := newFile(t, dir, size)
		o := wantOpens(t, path)
		if o.Size() != size || o.Path() != path {
			t.Errorf("got %s of %d bytes, want %s of %d", o.Path(), o.Size(), path, size)
		}
	}
	t.Chdir(dir)
	path := newFile(t, dir, 512)
	if o := wantOpens(t, filepath.Base(path)); o.Path() != path {
		t.Errorf("path of %s: got %s, want an absolute one", filepath.Base(path), o.Path())
	}
}

// hosts are the kinds of origins: a file on the file system of temporary files, a
// file in memory, and a block device.
var hosts = []struct {
	name string
	open func(t *testing.T, size int64) *hostFile
}{
	{"file on disk", func(t *testing.T, size int64) *hostFile { return openHost(t, newFile(t, t.TempDir(), size)) }},
	{"file in memory", func(t *testing.T, size int64) *hostFile { return openHost(t, newFile(t, memoryDir(t), size)) }},
	{"loop device", func(t *testing.T, size int64) *hostFile {
		return openHost(t, newLoop(t, newFile(t, t.TempDir(), size)))
	}},
}

func openHost(t *testing.T, path string) *hostFile { return wantOpens(t, path).file.(*hostFile) }

// memoryDir is a directory on a tmpfs.
func memoryDir(t *testing.T) string {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs("/dev/shm", &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		lacking(t, "/dev/shm is no tmpfs")
	}
	dir, err := os.MkdirTemp("/dev/shm", "cow-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestHostZero zeroes ranges with and without a hole, aligned and not. Where the
// host cannot, it must have changed nothing.
func TestHostZero(t *testing.T) {
	const size = 1 << 20
	for _, h := range hosts {
		t.Run(h.name, func(t *testing.T) {
			f := h.open(t, size)
			for _, tc := range []struct {
				name   string
				off, n int64
			}{
				{"blocks", 64 << 10, 128 << 10},
				{"sectors", 512, 3 * 512},
				{"one byte", 5, 1},
				{"across blocks", 4000, 9000},
				{"to the end", size - 1000, 1000},
				{"all", 0, size},
			} {
				for _, free := range []bool{false, true} {
					want := bytes.Repeat([]byte{7}, size)
					if _, err := f.WriteAt(want, 0); err != nil {
						t.Fatal(err)
					}
					err := f.zero(tc.off, tc.n, free)
					t.Logf("%s, free: %v: %v", tc.name, free, err)
					if err == nil {
						clear(want[tc.off : tc.off+tc.n])
					} else if err != syscall.EOPNOTSUPP {
						t.Errorf("%s, free: %v: got %v, want success or EOPNOTSUPP", tc.name, free, err)
					}
					if err != nil && free && tc.off%4096 == 0 && tc.n%4096 == 0 {
						t.Errorf("%s cannot be freed: %v", tc.name, err)
					}
					got := make([]byte, size)
					if _, err := f.ReadAt(got, 0); err != nil {
						t.Fatal(err)
					}
					if at := firstDiff(got, want); at >= 0 {
						t.Errorf("%s, free: %v, %v: byte %d: got %d, want %d", tc.name, free, err, at, got[at], want[at])
					}
					if end, err := f.Seek(0, io.SeekEnd); err != nil || end != size {
						t.Errorf("%s, free: %v: size became %d (%v)", tc.name, free, end, err)
					}
				}
			}
		})
	}
}

// TestHostRuns asks for runs of data and hole from many places.
func TestHostRuns(t *testing.T) {
	const size, k = 4 << 20, 1 << 10
	type run struct {
		hole bool
		end  int64
	}
	layout := []run{{false, 64 * k}, {true, 1024 * k}, {false, 1028 * k}, {true, size}}
	for _, h := range hosts {
		t.Run(h.name, func(t *testing.T) {
			f := h.open(t, size)
			for _, off := range []int64{0, 1024 * k} {
				n := int64(64 * k)
				if off > 0 {
					n = 4 * k
				}
				if _, err := f.WriteAt(bytes.Repeat([]byte{1}, int(n)), off); err != nil {
					t.Fatal(err)
				}
			}
			for _, tc := range []struct{ off, end int64 }{
				{0, size}, {0, 4 * k}, {4*k + 1, size}, {63 * k, 65 * k}, {63 * k, 63*k + chunkSize}, {63 * k, 64*k + chunkSize}, {64 * k, size}, {64 * k, 68 * k}, {1024*k - 1, 1024 * k},
				{1024 * k, size}, {1028 * k, size}, {2000 * k, 3000 * k}, {size - 1, size},
			} {
				want := run{false, tc.end} // what cannot tell is all data
				for _, r := range layout {
					if !f.block && tc.off < r.end {
						if r.hole || tc.end-tc.off > chunkSize {
							want = run{r.hole, min(r.end, tc.end)}
						}
						break
					}
				}
				hole, to, err := f.next(tc.off, tc.end)
				if got := (run{hole, to}); err != nil || got != want {
					t.Errorf("from %d to %d: got %+v, %v, want %+v", tc.off, tc.end, got, err, want)
				}
			}
		})
	}
}

// TestHostRunsOfCutFile checks that what was cut off a file behind our back does
// not become a hole, which images would read as zeroes.
func TestHostRunsOfCutFile(t *testing.T) {
	f := openHost(t, newFile(t, t.TempDir(), 1<<20))
	if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(512 << 10); err != nil {
		t.Fatal(err)
	}
	if hole, to, err := f.next(0, 1<<20); err != nil || hole || to != 512<<10 {
		t.Errorf("what is left: got hole %v to %d, %v, want data to %d", hole, to, err, 512<<10)
	}
	if hole, _, err := f.next(512<<10, 1<<20); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("what was cut off: got hole %v, %v, want ErrUnexpectedEOF", hole, err)
	}
}

// openDevice opens a device over a file.
func (r *rig) openDevice(path string, c Config) *Device {
	r.t.Helper()
	o, err := OpenOrigin(path)
	if err != nil {
		r.t.Fatal(err)
	}
	c.Name = "real"
	d, err := r.cat.Open(o, r.pool, c)
	if err != nil {
		r.t.Fatal(err)
	}
	r.devs = append(r.devs, d)
	return d
}

// TestImageOfCutFile checks that an image whose origin was cut behind our back
// answers with an error and not with zeroes, also when the range is written anew.
func TestImageOfCutFile(t *testing.T) {
	const size = 1 << 20
	r := newEmptyRig(t)
	r.addPart(16 << 20)
	path := newFile(t, t.TempDir(), size)
	d := r.openDevice(path, Config{})
	put(t, d, 1, 0, size)
	i := image(t, r.take("s"), "real")
	if err := os.Truncate(path, size/2); err != nil {
		t.Fatal(err)
	}
	put(t, d, 2, size/2, size/2)
	p := make([]byte, size/2)
	if err := i.Read(p, size/2); !errors.Is(err, syscall.EIO) {
		t.Errorf("what was cut off: got %v and %d, want EIO", err, p[0])
	}
	want(t, d, 2, size/2, size/2)
}

// TestHostRunsWhileHolesAreMade asks for runs while data comes and goes: none is
// empty.
func TestHostRunsWhileHolesAreMade(t *testing.T) {
	f := openHost(t, newFile(t, memoryDir(t), 64<<10))
	var over atomic.Bool
	var changer sync.WaitGroup
	changer.Go(func() {
		p := make([]byte, 64<<10)
		for !over.Load() {
			f.WriteAt(p, 0)
			f.zero(0, 64<<10, true)
		}
	})
	for range 20000 {
		_, to, err := f.next(0, 64<<10)
		if err != nil || to <= 0 {
			t.Errorf("got a run to %d, %v", to, err)
			break
		}
	}
	over.Store(true)
	changer.Wait()
}

func TestHostTryRead(t *testing.T) {
	const size = 1 << 20
	for _, h := range hosts {
		t.Run(h.name, func(t *testing.T) {
			f := h.open(t, size)
			want := bytes.Repeat([]byte{3}, size)
			if _, err := f.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, size)
			if h.name == "file in memory" {
				if err := f.tryReadAt(got, 0); err == nil && !bytes.Equal(got, want) {
					t.Error("got other bytes than were written")
				}
				return // (tmpfs does not know reads without a wait)
			}
			if err := f.tryReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("what was just written: got %v, want it at once", err)
			}
			if err := f.tryReadAt(got[:512], size-512); err != nil {
				t.Errorf("the last sector: %v", err)
			}
			if err := f.tryReadAt(got[:1024], size-512); err != syscall.EAGAIN {
				t.Errorf("beyond the end: got %v, want EAGAIN", err)
			}
			if err := errors.Join(f.sync(false), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
				t.Fatal(err)
			}
			if err := f.tryReadAt(got, 0); err != syscall.EAGAIN {
				t.Errorf("what is not in memory: got %v, want EAGAIN", err)
			}
			if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
				t.Errorf("the same with a wait: got other bytes, or %v", err)
			}
		})
	}
}

func TestHostTryWrite(t *testing.T) {
	const size = 1 << 20
	for _, h := range hosts {
		t.Run(h.name, func(t *testing.T) {
			f := h.open(t, size)
			for _, tc := range []struct {
				name   string
				off, n int
				want   error
			}{
				{"a block", 4096, 4096, nil},
				{"as much as it takes", 0, tryWriteLimit, nil},
				{"too much", 0, tryWriteLimit + 4096, syscall.EAGAIN},
				{"half a block", 4096, 2048, syscall.EAGAIN},
				{"across blocks", 2048, 4096, syscall.EAGAIN},
				{"the last block", size - 4096, 4096, nil},
			} {
				before, after := make([]byte, tc.n), make([]byte, tc.n)
				if _, err := f.ReadAt(before, int64(tc.off)); err != nil {
					t.Fatal(err)
				}
				p := bytes.Repeat([]byte{before[0] + 1}, tc.n)
				if err := f.tryWriteAt(p, int64(tc.off)); err != tc.want {
					t.Errorf("%s: got %v, want %v", tc.name, err, tc.want)
				}
				want := p
				if tc.want != nil {
					want = before
				}
				if _, err := f.ReadAt(after, int64(tc.off)); err != nil || !bytes.Equal(after, want) {
					t.Errorf("%s: afterwards got %d, want %d (%v)", tc.name, after[0], want[0], err)
				}
			}
		})
	}
}

// TestHostClosed checks that a closed origin says so, whatever is asked of it.
func TestHostClosed(t *testing.T) {
	f := openHost(t, newFile(t, t.TempDir(), 1<<20))
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, _, next := f.next(0, 4096)
	_, read := f.ReadAt(make([]byte, 1), 0)
	for what, err := range map[string]error{
		"try to read":  f.tryReadAt(make([]byte, 1), 0),
		"try to write": f.tryWriteAt(make([]byte, 4096), 0),
		"read":         read,
		"sync":         f.sync(false),
		"zero":         f.zero(0, 4096, true),
		"next":         next,
	} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s: got %v, want os.ErrClosed", what, err)
		}
	}
}

// TestHostClosedMeanwhile closes origins under readers while others open files: the
// number of a closed file goes to the next one, and no reader may end up there.
func TestHostClosedMeanwhile(t *testing.T) {
	dir := t.TempDir()
	ours, other := newFile(t, dir, 4096), newFile(t, dir, 4096)
	if err := errors.Join(os.WriteFile(ours, bytes.Repeat([]byte("o"), 4096), 0), os.WriteFile(other, bytes.Repeat([]byte("x"), 4096), 0)); err != nil {
		t.Fatal(err)
	}
	for range 1500 {
		o, err := OpenOrigin(ours)
		if err != nil {
			t.Fatal(err)
		}
		var readers sync.WaitGroup
		for range 3 {
			readers.Go(func() {
				for p := make([]byte, 16); o.file.tryReadAt(p, 0) == nil; {
					if p[0] != 'o' {
						t.Errorf("a read of a file that was closed meanwhile: got %q, from another file", p)
						return
					}
				}
			})
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		var files []*os.File
		for range 3 {
			f, err := os.Open(other)
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, f)
		}
		readers.Wait()
		for _, f := range files {
			f.Close()
		}
		if t.Failed() {
			return
		}
	}
}

// TestRequestsAfterTheEnd checks that they are answered as such, and that none
// counts as a failure of the device.
func TestRequestsAfterTheEnd(t *testing.T) {
	r := newEmptyRig(t)
	r.addPart(1 << 20)
	var events atomic.Int32
	d := r.openDevice(newFile(t, t.TempDir(), 1<<20), Config{Notify: func(e Event) {
		if e.Kind == EventDeviceFailed {
			events.Add(1)
		}
	}})
	if err := errors.Join(d.Flush(), d.Close()); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{
		"reset": d.Reset("test"), // would open the gate again
		"mark":  d.Mark(0, 1),
		"write": d.Write([]byte{1}, 0, false),
		"read":  d.Read(make([]byte, 1), 0),
		"flush": d.Flush(),
	} {
		if !errors.Is(err, ErrStopping) {
			t.Errorf("%s after the end: got %v, want ErrStopping", what, err)
		}
	}
	if events.Load() != 0 {
		t.Error("a request after the end counts as a failure of the device")
	}
}

// TestHugeOrigin takes a snapshot of origins of sizes that only sparse files have,
// and writes to their ends.
func TestHugeOrigin(t *testing.T) {
	for _, size := range []int64{16<<40 + SectorSize, 1<<50 - SectorSize, 1<<60 - SectorSize} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			path := filepath.Join(memoryDir(t), "huge.img")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, size); err != nil {
				lacking(t, err.Error())
			}
			r := newEmptyRig(t)
			r.addPart(16 << 20)
			d := r.openDevice(path, Config{})
			const n = 3*chunkSize + SectorSize
			put(t, d, 1, size-n, n)
			put(t, d, 1, size/3, n)
			i := image(t, r.take("s"), "real")
			put(t, d, 2, size-n, n)
			put(t, d, 2, 0, blockSize)
			if err := d.WriteZeroes(size/3, n, zeroFlags{}); err != nil {
				t.Fatal(err)
			}
			want(t, d, 2, size-n, n)
			want(t, i, 1, size-n, n)
			want(t, i, 1, size/3, n)
			want(t, i, 0, 0, blockSize)
			if _, err := i.ReadAt(make([]byte, 2), size-1); err != io.EOF {
				t.Errorf("read across the end: got %v, want EOF", err)
			}
			data, err := i.NextData(0)
			if want := size / 3 &^ (blockSize - 1); err != nil || data != want {
				t.Errorf("first data: got %d, %v, want %d", data, err, want)
			}
			hole, err := i.NextHole(size - n)
			if err != nil || hole != size {
				t.Errorf("hole after the last data: got %d, %v, want the end at %d", hole, err, size)
			}
		})
	}
}
