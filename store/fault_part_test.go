package store

import (
	"sync"
	"sync/atomic"
	"testing"
)

// faulty is a part that tests make fail, hold and hang: hook is called before
// each operation, and its error is that of the operation.
type faulty struct {
	Part
	traits Traits

	avail atomic.Int64 // what Avail returns

	mu   sync.Mutex
	hook func(op string, off, n int64) error
}

// newFaulty wraps a part in memory.
func newFaulty(t testing.TB, limit int64) *faulty {
	inner := openMem(t, limit)
	f := &faulty{Part: inner, traits: inner.Traits()}
	f.traits.MayHang = true
	f.avail.Store(1 << 40)
	return f
}

// set replaces the hook; nil lets every operation through.
func (f *faulty) set(hook func(op string, off, n int64) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hook = hook
}

// failing is a hook that fails the operations named op.
func failing(op string, err error) func(string, int64, int64) error {
	return func(got string, _, _ int64) error {
		if got == op {
			return err
		}
		return nil
	}
}

// gate is a hook that holds the first operation named op: entered is closed
// when it is there, and it goes on once release is closed.
func gate(op string) (hook func(string, int64, int64) error, entered, release chan struct{}) {
	entered, release = make(chan struct{}), make(chan struct{})
	var held atomic.Bool
	return func(got string, _, _ int64) error {
		if got == op && held.CompareAndSwap(false, true) {
			close(entered)
			<-release
		}
		return nil
	}, entered, release
}

func (f *faulty) call(op string, off, n int64) error {
	f.mu.Lock()
	hook := f.hook
	f.mu.Unlock()
	if hook == nil {
		return nil
	}
	return hook(op, off, n)
}

func (f *faulty) Traits() Traits { return f.traits }

func (f *faulty) ReadAt(b []byte, off int64) (int, error) {
	if err := f.call("read", off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.Part.ReadAt(b, off)
}

func (f *faulty) WriteAt(b []byte, off int64) (int, error) {
	if err := f.call("write", off, int64(len(b))); err != nil {
		return 0, err
	}
	return f.Part.WriteAt(b, off)
}

func (f *faulty) Prepare(off, n int64) error {
	if err := f.call("prepare", off, n); err != nil {
		return err
	}
	return f.Part.Prepare(off, n)
}

func (f *faulty) Punch(off, n int64) error {
	if err := f.call("punch", off, n); err != nil {
		return err
	}
	return f.Part.Punch(off, n)
}

func (f *faulty) Avail() (int64, error) {
	if err := f.call("avail", 0, 0); err != nil {
		return 0, err
	}
	return f.avail.Load(), nil
}

func (f *faulty) Close() error {
	if err := f.call("close", 0, 0); err != nil {
		return err
	}
	return f.Part.Close()
}
