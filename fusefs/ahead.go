// Reading ahead for those who read an image from end to end.
//
// Such a reader asks for the next piece when it has the one before: while it waits
// for us its processor is idle, and while it works ours is. So while the kernel
// copies a reply, and while the reader does with it what it will, a goroutine reads
// the windows that come next. It reads a few at a time, since to wake it costs a
// good part of what one window does.
//
// What was read ahead stays right. A read-only image never changes, and a window is
// read by Image.ReadAt as all is, which looks again after it has read. Only whether
// the image is still good is asked once more when a window is handed out: one that is
// lost answers nothing, whatever was read before.

package fusefs

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
)

const (
	// aheadBatch is how many windows are read at a time. A reader that has fewer
	// of them before it gets so many more.
	aheadBatch = 2

	// aheadAfter is how many bytes somebody reads in sequence before he counts as
	// one who goes on: who looks for signatures is not.
	aheadAfter = 256 << 10

	// aheadIdle is for how long a window is kept from other readers, if nobody
	// asks for it.
	aheadIdle = time.Second

	// largeRead is from where on a read has use of a buffer of ours.
	largeRead = 256 << 10
)

// readers are the open images of a tree.
type readers struct {
	panicked func(any) // told of a panic of the image's while it is read ahead
	buffers  buffers
	running  sync.WaitGroup // the goroutines that read ahead

	// mu protects what follows, the streams and their windows. Not held across I/O.
	mu      sync.Mutex
	windows []*window // of all streams, oldest first
}

// stream is an open image as its reader sees it.
type stream struct {
	*readers
	image   Image
	next    int64     // where the last read ended; -1 before the first
	run     int64     // bytes read in sequence up to there
	reading int       // reads under way
	ahead   bool      // a goroutine reads windows
	windows []*window // ascending, without gaps
}

// window is a piece of an image that was read ahead, or is to be.
type window struct {
	stream  *stream
	off, to int64
	buffer  *buffer
	born    time.Time
	begun   bool // somebody reads it, or has

	once sync.Once
	err  error
}

// newStream is for an image that was just opened.
func (r *readers) newStream(image Image) *stream {
	r.buffers.opened(1)
	return &stream{readers: r, image: image, next: -1}
}

// stop gives the memory back when nobody reads ahead any more. No stream is used any
// more, though the kernel may not have closed all of them.
func (r *readers) stop() {
	r.mu.Lock()
	for len(r.windows) > 0 {
		r.windows[0].stream.dropLocked(r.windows[0])
	}
	r.mu.Unlock()
	r.running.Wait()
	r.buffers.close()
}

// read returns the image's bytes from off on, as many as p has room for, which lie
// within its size. They may be in p.
func (s *stream) read(p []byte, off int64) (fuse.ReadResult, error) {
	n := int64(len(p))
	if n == 0 {
		return fuse.ReadResultData(nil), nil
	}
	w := s.begin(off, off+n)
	defer s.end()
	if w != nil {
		defer w.buffer.release()
		if w.fill() == nil {
			if state := s.image.State(); state != "ok" {
				return nil, fmt.Errorf("the image is %s", state)
			}
			return w.buffer.reply(off-w.off, off+n-w.off), nil
		}
		// Whether the reader is to know of it the image itself says.
	}
	if n >= largeRead {
		if buf := s.buffers.take(); buf != nil {
			defer buf.release()
			if err := readFull(s.image, buf.bytes[:n], off); err != nil {
				return nil, err
			}
			return buf.reply(0, n), nil
		}
	}
	if err := readFull(s.image, p, off); err != nil {
		return nil, err
	}
	return fuse.ReadResultData(p), nil
}

// readFull fills p. An error counts also when p is full: an image looks whether it is
// still good after it has read.
func readFull(image Image, p []byte, off int64) error {
	n, err := image.ReadAt(p, off)
	if err == io.EOF {
		err = nil
	}
	if n < len(p) {
		err = cmp.Or(err, io.ErrUnexpectedEOF)
	}
	return err
}

// begin says that [off, to) is going to be read, until end is called. It returns the
// window that has all of it, if there is one, with a use of its buffer for the caller,
// and sees to it that what comes next is read ahead.
func (s *stream) begin(off, to int64) *window {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off != s.next {
		s.run = 0
	}
	s.next = to
	s.run += to - off
	s.reading++
	for len(s.windows) > 0 && !s.windows[0].has(off, to) {
		s.dropLocked(s.windows[0])
	}
	// Where several reads are under way none of them waits for another.
	if s.reading == 1 && s.run > to-off && s.run >= aheadAfter && !s.image.Writable() {
		s.goOnLocked(to, to-off)
	}
	if len(s.windows) == 0 || !s.windows[0].has(off, to) {
		return nil
	}
	return s.windows[0].useLocked()
}

func (s *stream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reading--
}

// close gives up what was read ahead.
func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.windows) > 0 {
		s.dropLocked(s.windows[0])
	}
	s.buffers.opened(-1)
}

// goOnLocked sees to it that windows are read for a reader that has come as far as to
// and asks for piece bytes at a time.
func (s *stream) goOnLocked(to, piece int64) {
	have := len(s.windows)
	if have > aheadBatch {
		return
	}
	if have > 0 {
		to = s.windows[have-1].to
	}
	for range aheadBatch {
		// Whole pieces, so that none is in two windows.
		to = s.addLocked(to, min(to+maxIO/piece*piece, s.image.Size()))
	}
	if len(s.windows) > have && !s.ahead {
		s.ahead = true
		s.running.Go(s.readAhead)
	}
}

// addLocked adds a window and returns its end; off if there is nothing to read, or no
// buffer for it.
func (s *stream) addLocked(off, to int64) int64 {
	if off >= to {
		return off
	}
	buf := s.buffers.take()
	if all := s.readers.windows; buf == nil && len(all) > 0 && time.Since(all[0].born) > aheadIdle {
		all[0].stream.dropLocked(all[0])
		buf = s.buffers.take()
	}
	if buf == nil {
		return off
	}
	w := &window{stream: s, off: off, to: to, buffer: buf, born: time.Now()}
	s.windows = append(s.windows, w)
	s.readers.windows = append(s.readers.windows, w)
	return to
}

func (s *stream) dropLocked(w *window) {
	same := func(v *window) bool { return v == w }
	s.windows = slices.DeleteFunc(s.windows, same)
	s.readers.windows = slices.DeleteFunc(s.readers.windows, same)
	w.buffer.release()
}

// readAhead reads the windows that nobody has begun to read, in order, until there is
// none any more.
func (s *stream) readAhead() {
	for w := s.nextWindow(); w != nil; w = s.nextWindow() {
		s.fillAhead(w)
	}
}

// nextWindow returns the window to be read next, with a use of its buffer.
func (s *stream) nextWindow() *window {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range s.windows {
		if !w.begun {
			return w.useLocked()
		}
	}
	s.ahead = false
	return nil
}

func (s *stream) fillAhead(w *window) {
	defer w.buffer.release()
	defer func() {
		if v := recover(); v != nil {
			s.panicked(v)
		}
	}()
	w.fill()
}

func (w *window) has(off, to int64) bool { return w.off <= off && to <= w.to }

// useLocked returns w with a use of its buffer for one who will fill it, or has it
// filled already.
func (w *window) useLocked() *window {
	w.begun = true
	w.buffer.hold()
	return w
}

// fill reads the window, or waits until it is read.
func (w *window) fill() error {
	w.once.Do(func() {
		w.err = syscall.EIO // if the image panics
		w.err = readFull(w.stream.image, w.buffer.bytes[:w.to-w.off], w.off)
	})
	return w.err
}
