// Buffers for what is read of images.

package fusefs

import (
	"sync"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// bufferCount bounds the memory of a tree's buffers, each of maxIO bytes.
	bufferCount = 32

	// keptBuffers are so many that keep their memory while no image is open.
	keptBuffers = 4

	hugePage = 2 << 20
)

// buffers are memory for large reads. The buffer that was used last is given out
// first, because it is still in the processor's cache (go-fuse has a buffer for each
// of Go's processors, and a reader meets them all in turn), and they are in huge
// pages, because the kernel looks up each page that a reply is in.
type buffers struct {
	// mu protects the fields below and the buffers' users. Not held across I/O.
	mu    sync.Mutex
	mem   []byte    // what was mapped; nil where there is none
	free  []*buffer // what was used last is last
	files int       // that are open
}

// buffer is one of them. Who has a use of it may read it; the one that it was made
// for fills it first.
type buffer struct {
	pool  *buffers
	bytes []byte
	users int
}

// open maps the memory, which takes nothing before it is used. Without memory all is
// as if each buffer was in use.
func (b *buffers) open() {
	mem, err := unix.Mmap(-1, 0, bufferCount*maxIO+hugePage, unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return
	}
	b.mem = mem
	_ = unix.Madvise(b.all(), unix.MADV_HUGEPAGE)
	_ = unix.Madvise(b.all(), unix.MADV_DONTDUMP)
	for n := bufferCount - 1; n >= 0; n-- {
		b.free = append(b.free, &buffer{pool: b, bytes: b.all()[n*maxIO:][:maxIO:maxIO]})
	}
}

// all is the aligned part of the memory.
func (b *buffers) all() []byte {
	skip := -uintptr(unsafe.Pointer(&b.mem[0])) % hugePage
	return b.mem[skip:][:bufferCount*maxIO]
}

// close gives the memory back. Nobody uses a buffer, or takes one, any more.
func (b *buffers) close() {
	if b.mem != nil {
		_ = unix.Munmap(b.mem)
		b.mem = nil
	}
}

// take returns a buffer with one user, nil where none is free.
func (b *buffers) take() *buffer {
	b.mu.Lock()
	defer b.mu.Unlock()
	last := len(b.free) - 1
	if last < 0 {
		return nil
	}
	buf := b.free[last]
	b.free = b.free[:last]
	buf.users = 1
	return buf
}

// opened counts the open files: n more.
func (b *buffers) opened(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.files += n
	b.shrinkLocked()
}

// shrinkLocked gives memory back that nobody is about to use.
func (b *buffers) shrinkLocked() {
	if b.files == 0 && len(b.free) == bufferCount {
		_ = unix.Madvise(b.all()[keptBuffers*maxIO:], unix.MADV_DONTNEED)
	}
}

// hold adds a user.
func (b *buffer) hold() {
	b.pool.mu.Lock()
	defer b.pool.mu.Unlock()
	b.users++
}

// release takes a user away. After the last one the buffer is free.
func (b *buffer) release() {
	p := b.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	if b.users--; b.users == 0 {
		p.free = append(p.free, b)
		p.shrinkLocked()
	}
}

// reply returns a reply of the buffer's bytes [from, to), and makes it a user until
// it was sent.
func (b *buffer) reply(from, to int64) fuse.ReadResult {
	b.hold()
	return &reply{b, [1][]byte{b.bytes[from:to]}}
}

// reply is sent by go-fuse from where it is, as one of ReadResultVector, and then is
// Done.
type reply struct {
	buffer *buffer
	data   [1][]byte
}

func (r *reply) Slices() ([][]byte, fuse.Status)    { return r.data[:], fuse.OK }
func (r *reply) Bytes([]byte) ([]byte, fuse.Status) { return r.data[0], fuse.OK }
func (r *reply) Size() int                          { return len(r.data[0]) }
func (r *reply) Done()                              { r.buffer.release() }
