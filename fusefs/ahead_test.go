package fusefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// ahead is an image whose reads the test sees.
type ahead struct {
	t       *testing.T
	tree    *Tree
	image   *fakeImage
	content []byte
	name    string // of its file
	file    *os.File

	begun chan int64 // the offset of each read of the image, when that begins
}

// openAhead opens an image of size bytes. hook, if not nil, is called when a read of
// the image begins.
func openAhead(t *testing.T, size int, writable bool, hook func(off int64) error) *ahead {
	t.Helper()
	a := &ahead{t: t, content: holey(t, size), begun: make(chan int64, 100000)}
	src := newFakeSource()
	src.add("vda", a.content)
	if err := src.Take("one"); err != nil {
		t.Fatal(err)
	}
	a.image = src.snaps["one"].images["vda"]
	a.image.writable = writable
	a.image.reading = func(off int64) error {
		a.begun <- off
		if hook != nil {
			return hook(off)
		}
		return nil
	}
	tree, dir := mountFake(t, src)
	a.tree, a.name = tree, filepath.Join(dir, "snapshots/one/vda.img")
	a.file = open(t, a.name)
	return a
}

// read reads n bytes at off, as one request where they are no more than that.
func (a *ahead) read(off, n int64) error {
	p := make([]byte, n)
	got, err := unix.Pread(int(a.file.Fd()), p, off)
	if err != nil {
		return err
	}
	if want := a.content[min(off, int64(len(a.content))):min(off+n, int64(len(a.content)))]; !bytes.Equal(p[:got], want) {
		return fmt.Errorf("read of %d at %d: %d bytes, want %d, or they differ", n, off, got, len(want))
	}
	return nil
}

// reads reads pieces of 1 MiB at these offsets, which are given in MiB.
func (a *ahead) reads(offs ...int64) {
	a.t.Helper()
	for _, off := range offs {
		if err := a.read(off*mib, mib); err != nil {
			a.t.Fatal(err)
		}
	}
}

// wantBegun waits until as many reads of the image have begun as there are offsets, in
// MiB, and compares: those of the reader and those ahead of it come in any order.
func (a *ahead) wantBegun(offs ...int64) {
	a.t.Helper()
	var got []int64
	for range offs {
		select {
		case off := <-a.begun:
			got = append(got, off/mib)
		case <-time.After(20 * time.Second):
			a.t.Fatalf("the image is read\n got at %v (MiB)\nwant at %v", got, offs)
		}
	}
	if slices.Sort(got); !slices.Equal(got, offs) {
		a.t.Fatalf("the image is read\n got at %v (MiB)\nwant at %v", got, offs)
	}
}

// windows returns the offsets in MiB of what is read ahead.
func (a *ahead) windows() (offs []int64) {
	a.tree.readers.mu.Lock()
	defer a.tree.readers.mu.Unlock()
	for _, w := range a.tree.readers.windows {
		offs = append(offs, w.off/mib)
	}
	return offs
}

// TestReadAhead reads an image from end to end: what comes next is read before it is
// asked for, and nothing twice.
func TestReadAhead(t *testing.T) {
	a := openAhead(t, 6*mib+512, false, nil)
	a.reads(0, 1)
	a.wantBegun(0, 1, 2, 3)
	a.reads(2)
	a.wantBegun(4, 5)
	a.reads(3, 4, 5, 6, 7)
	a.wantBegun(6)
	select {
	case off := <-a.begun:
		t.Errorf("the image is read again, at %d", off)
	default:
	}
}

// TestReadAheadOnlyOfSequence reads in ways that do not go on: nothing is read ahead.
func TestReadAheadOnlyOfSequence(t *testing.T) {
	for _, tc := range []struct {
		name string
		n    int64
		offs []int64
	}{
		{"at random", mib, []int64{mib, 3 * mib, 0, 5 * mib, 2 * mib}},
		{"backwards", mib, []int64{4 * mib, 3 * mib, 2 * mib, mib, 0}},
		{"the same again", mib, []int64{mib, mib, mib}},
		{"once", mib, []int64{0}},
		{"looking for signatures", 4096, []int64{0, 4096, 8192, 12288, 65536, 69632}},
		{"at the end", mib, []int64{6 * mib, 7 * mib, 8 * mib, 9 * mib}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := openAhead(t, 8*mib, false, nil)
			for _, off := range tc.offs {
				if err := a.read(off, tc.n); err != nil {
					t.Fatal(err)
				}
			}
			if got := a.windows(); len(got) != 0 {
				t.Errorf("read ahead\n got %v (MiB)\nwant nothing", got)
			}
		})
	}
}

// TestReadAheadOfLostImage loses the image after it was read ahead: who asks for what
// was read gets an error all the same.
func TestReadAheadOfLostImage(t *testing.T) {
	a := openAhead(t, 8*mib, false, nil)
	a.reads(0, 1)
	a.wantBegun(0, 1, 2, 3) // with 3 begun, 2 is read
	a.image.destroyed.Store(true)
	wantErrno(t, "read of what was read ahead", a.read(2*mib, mib), syscall.EIO)
	wantErrno(t, "the next read", a.read(3*mib, mib), syscall.EIO)
}

// TestReadAheadFails lets reading ahead fail. That is no failure of the reader's, who
// reads again; what fails then as well is.
func TestReadAheadFails(t *testing.T) {
	bad := errors.New("a bad sector")
	for _, tc := range []struct {
		name string
		fail func(times int) error // of reads at 2 MiB
		want error
	}{
		{"once", func(times int) error { return map[int]error{1: bad}[times] }, nil},
		{"always", func(int) error { return bad }, syscall.EIO},
		{"by a panic", func(times int) error {
			if times == 1 {
				panic("a bug")
			}
			return nil
		}, nil},
		{"by a panic each time", func(int) error { panic("a bug") }, syscall.EIO},
	} {
		t.Run(tc.name, func(t *testing.T) {
			times := 0 // one after the other
			a := openAhead(t, 8*mib, false, func(off int64) error {
				if off != 2*mib {
					return nil
				}
				times++
				return tc.fail(times)
			})
			a.reads(0, 1)
			a.wantBegun(0, 1, 2, 3)
			if err := a.read(2*mib, mib); !errors.Is(err, tc.want) {
				t.Errorf("read of what could not be read ahead\n got %v\nwant %v", err, tc.want)
			}
			a.reads(3, 4)
		})
	}
}

// TestReadAheadNotOfWritable reads a writable image from end to end while it is
// written by somebody else.
func TestReadAheadNotOfWritable(t *testing.T) {
	a := openAhead(t, 8*mib, true, nil)
	w, err := os.OpenFile(a.name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	for off := int64(0); off < 8; off++ {
		a.reads(off)
		if got := a.windows(); len(got) != 0 {
			t.Fatalf("read ahead\n got %v (MiB)\nwant nothing", got)
		}
		next := (off + 1) % 8 * mib
		copy(a.content[next:], bytes.Repeat([]byte{byte(off)}, mib))
		if _, err := w.WriteAt(a.content[next:next+mib], next); err != nil {
			t.Fatal(err)
		}
	}
}

// TestReadAheadSharedFile has several readers of one open file, each from end to end
// of its own part, in pieces of its own size.
func TestReadAheadSharedFile(t *testing.T) {
	const part = 5*mib + 1234
	a := openAhead(t, 5*part, false, nil)
	var readers sync.WaitGroup
	for i, n := range []int64{512, 65537, mib, 300000, 3 * mib} {
		readers.Go(func() {
			for off := int64(0); off < part; off += n {
				if err := a.read(int64(i)*part+off, min(n, part-off)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	readers.Wait()
}

// TestReadAheadUnmount unmounts while something is read ahead: the Source is not left
// before that has ended.
func TestReadAheadUnmount(t *testing.T) {
	release := make(chan struct{})
	a := openAhead(t, 8*mib, false, func(off int64) error {
		if off == 2*mib {
			<-release
		}
		return nil
	})
	a.reads(0, 1)
	a.wantBegun(0, 1, 2)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := a.tree.Unmount(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Unmount while the image is read\n got %v\nwant %v", err, context.DeadlineExceeded)
	}
	wait(t, "Done", a.tree.Done())
	close(release)
}

// TestReadAheadBounded has more readers than there are buffers: all get their bytes.
// Who has stopped makes room for others after a while, and who closes at once.
func TestReadAheadBounded(t *testing.T) {
	a := openAhead(t, 8*mib, false, nil)
	var files []*os.File
	for range bufferCount {
		a.file = open(t, a.name)
		files = append(files, a.file)
		a.reads(0, 1)
	}
	r := &a.tree.readers
	oldest := func() *window {
		r.mu.Lock()
		defer r.mu.Unlock()
		if n := len(r.windows); n < bufferCount/2 || n > bufferCount {
			t.Fatalf("windows of %d readers\n got %d\nwant about %d", len(files), n, bufferCount)
		}
		return r.windows[0]
	}
	first := oldest()
	r.mu.Lock()
	for _, w := range r.windows {
		w.born = time.Now().Add(time.Hour) // however slow this test is
	}
	r.mu.Unlock()
	a.reads(2)
	if oldest() != first {
		t.Error("a window that was read just now is gone")
	}
	var rest []*buffer // so that nothing is left for the next
	for buf := r.buffers.take(); buf != nil; buf = r.buffers.take() {
		rest = append(rest, buf)
	}
	r.mu.Lock()
	first.born = time.Now().Add(-2 * aheadIdle)
	r.mu.Unlock()
	a.reads(3)
	if oldest() == first {
		t.Error("a window that nobody asks for is still there")
	}
	for _, buf := range rest {
		buf.release()
	}

	for _, f := range files {
		f.Close()
	}
	a.file = open(t, a.name)
	a.reads(0, 1, 2, 3, 4, 5, 6, 7)
}

// TestReadsUnaligned reads an image that ends within a block at offsets and in lengths
// that are aligned to nothing, through the page cache of nobody.
func TestReadsUnaligned(t *testing.T) {
	const size = 3*mib + 3*512
	content := holey(t, size)
	_, dir := mountImage(t, content, false)
	for _, flags := range []int{unix.O_RDONLY, unix.O_RDONLY | unix.O_DIRECT} {
		fd, err := unix.Open(filepath.Join(dir, "vda.img"), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		for _, off := range []int64{0, 1, 511, 4095, 4097, mib - 1, mib + 1, size - 4097, size - 513, size - 1, size, size + 1} {
			for _, n := range []int{1, 511, 4096, 4097, mib, mib + 1, 2*mib + 7} {
				p := make([]byte, n+3)[3:] // nor is the memory
				got, err := unix.Pread(fd, p, off)
				want := content[min(off, size):min(off+int64(n), size)]
				if err != nil || !bytes.Equal(p[:got], want) {
					t.Errorf("flags %#x: read of %d at %d: %d bytes, error %v, want %d bytes, or they differ", flags, n, off, got, err, len(want))
				}
			}
		}
	}
}

// TestReadAheadToTheEnd reads images of odd sizes from end to end in pieces of odd
// sizes.
func TestReadAheadToTheEnd(t *testing.T) {
	for _, size := range []int{2*mib + 512, 4 * mib, 4*mib - 512} {
		content := holey(t, size)
		_, dir := mountImage(t, content, false)
		for _, n := range []int{512, 4096, 12345, 100000, mib - 1, mib, mib + 1, 3 * mib} {
			f := open(t, filepath.Join(dir, "vda.img"))
			var got bytes.Buffer
			if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{f}, make([]byte, n)); err != nil || !bytes.Equal(got.Bytes(), content) {
				t.Errorf("%d bytes in pieces of %d: %d bytes, error %v, or they differ", size, n, got.Len(), err)
			}
		}
	}
}

// TestReadAheadGivenUp looks at what a stream holds: nothing of what its reader went
// away from, and nothing once it is closed.
func TestReadAheadGivenUp(t *testing.T) {
	var r readers
	r.buffers.open()
	s := r.newStream(&fakeImage{content: make([]byte, 16*mib)})
	read := func(off int64) {
		t.Helper()
		result, err := s.read(make([]byte, mib), off*mib)
		if err != nil {
			t.Fatal(err)
		}
		result.Done()
	}
	want := func(n int) {
		t.Helper()
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(s.windows) != n || len(r.windows) != n {
			t.Errorf("windows of the stream and of all\n got %d and %d\nwant %d", len(s.windows), len(r.windows), n)
		}
	}
	read(5)
	read(6)
	want(aheadBatch)
	read(1) // before them
	want(0)
	read(2)
	read(9) // after them
	want(0)
	read(10)
	s.close()
	want(0)
	r.running.Wait()
	if got := len(r.buffers.free); got != bufferCount {
		t.Errorf("free buffers\n got %d\nwant %d", got, bufferCount)
	}
	r.stop()
}

// TestBuffersGiveMemoryBack uses all buffers: their memory goes back to the system
// once no file is open, but for a few, and not before.
func TestBuffersGiveMemoryBack(t *testing.T) {
	var b buffers
	b.open()
	defer b.close()
	resident := func() (n int) {
		vec := make([]byte, bufferCount*maxIO/os.Getpagesize())
		all := b.all()
		if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&all[0])), uintptr(len(all)), uintptr(unsafe.Pointer(&vec[0]))); errno != 0 {
			t.Fatal(errno)
		}
		for _, v := range vec {
			n += int(v & 1)
		}
		return n * os.Getpagesize()
	}
	b.opened(1)
	b.opened(1)
	var taken []*buffer
	for buf := b.take(); buf != nil; buf = b.take() {
		for i := range buf.bytes {
			buf.bytes[i] = 1
		}
		taken = append(taken, buf)
	}
	b.opened(-1)
	for i, buf := range taken {
		buf.hold()
		buf.release()
		if got := len(b.free); got != i {
			t.Fatalf("free buffers with %d in use\n got %d\nwant %d", len(taken)-i, got, i)
		}
		buf.release()
	}
	if got := resident(); got != bufferCount*maxIO {
		t.Errorf("resident while a file is open\n got %d\nwant %d", got, bufferCount*maxIO)
	}
	b.opened(-1)
	if got := resident(); got != keptBuffers*maxIO {
		t.Errorf("resident afterwards\n got %d\nwant %d", got, keptBuffers*maxIO)
	}
	if buf := b.take(); buf != taken[len(taken)-1] {
		t.Error("what was used last is not what is given out first")
	}
}
