// Waiting for the state disk no longer than for a snapstore.
//
// A call on a disk that hangs does not come back, and an origin must be served all the same.
// So while a device is opened another goroutine makes each call on the state disk, and is
// given up after a while, with whatever it works on. Nobody waits any more then until that
// call has come back, for this device or another: one limit is enough to learn that a disk
// hangs. (A disk that is slow is waited for: a large map takes many calls.)
//
// What the device goes on with is a new generation that does not outlive the machine. The
// keeper of the durable state (keepDurable) begins that anew when the disk answers.

package cow

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// patience is shared by all who use one disk.
type patience struct {
	hanging atomic.Int64 // calls that were given up and have not come back
}

// hangs says whether a call hangs.
func (p *patience) hangs() bool { return p.hanging.Load() > 0 }

// call calls f and returns what it returns, or errNoAnswer after limit, and at once where
// another call hangs. Then f goes on, and late, if it is not nil, is called at its end.
func (p *patience) call(limit time.Duration, f func() error, late func()) error {
	if p.hangs() {
		limit = 0
	}
	var over atomic.Bool // set by who comes first, the end of f or the limit
	done := make(chan error, 1)
	go func() {
		err := f()
		if over.CompareAndSwap(false, true) {
			done <- err
			return
		}
		if late != nil {
			late()
		}
		p.hanging.Add(-1)
	}()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case err := <-done:
		return err
	case <-timeout.C:
	}
	p.hanging.Add(1)
	if !over.CompareAndSwap(false, true) {
		p.hanging.Add(-1)
		return <-done
	}
	return fmt.Errorf("the state directory: %w", errNoAnswer)
}

// promptDisk is a state disk for who opens a device. Only what is read goes through it.
type promptDisk struct {
	stateDisk
	patience *patience
	limit    time.Duration // for each call
	await    func()        // before anything is opened
}

// promptDisk is the state disk for who opens the device: half of the limit is left for what
// follows.
func (d *Device) promptDisk() promptDisk {
	return promptDisk{d.disk, &d.cat.patience, d.cfg.PreserveLimit / 2, d.awaitPredecessor}
}

func (d promptDisk) open(path string, create bool) (durableFile, error) {
	var f durableFile
	err := d.patience.call(d.limit, func() (err error) {
		d.await()
		f, err = d.stateDisk.open(path, create)
		return err
	}, func() {
		if f != nil {
			f.Close()
		}
	})
	if err != nil {
		return nil, err
	}
	return promptFile{f, d}, nil
}

// promptFile is a file of a promptDisk.
type promptFile struct {
	durableFile
	disk promptDisk
}

func (f promptFile) ReadAt(p []byte, off int64) (n int, err error) {
	own := make([]byte, len(p)) // what hangs may look at it at any later time
	var got int
	err = f.disk.patience.call(f.disk.limit, func() (err error) {
		got, err = f.durableFile.ReadAt(own, off)
		return err
	}, nil)
	if errors.Is(err, errNoAnswer) {
		return 0, err // got may change yet
	}
	return copy(p, own[:got]), err
}

// patient is the file for who has begun, and has limits of its own.
func (f promptFile) patient() durableFile { return f.durableFile }

func (f promptFile) Close() error {
	return f.disk.patience.call(f.disk.limit, f.durableFile.Close, nil)
}
