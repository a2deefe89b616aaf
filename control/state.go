// The state directory: found, made and locked, or done without.
//
// What it is on may hang, fail, be full or be read-only, and the origins are served all the
// same. Then nobody has its lock, so nothing in it is read or changed until the next start:
// the devices go on in generations that end with the machine (cow/nostate.go), and a snapstore
// that lies in it is left out. (Not even where the disk answers again: it may be our own export
// that it stands on, which a start finds out before anything is served.)
//
// What is wrong with the path itself is another matter: where it may not be used, leads
// through what is no directory, belongs to somebody else or is in use, whoever gave it has to
// be told, and the start is refused.

package control

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"blksnap/store"
)

// Kinds of events of a start that goes on without the state directory, or without a part of
// the snapstore.
const (
	eventStateLost = "state-lost"
	eventPartLost  = "store-lost"
)

// openState makes the state directory and locks it. Where its disk does not let it, it
// notes why, and the start goes on.
func (s *service) openState(ctx context.Context) error {
	if s.set.state == s.set.run {
		return nil
	}
	l, err := s.awaitState(ctx)
	if err == nil {
		s.later(func() error { return s.release(l) })
		return nil
	}
	if !diskFails(err) {
		return err
	}
	s.stateless = fmt.Errorf("state directory %s: %w", s.set.state, err)
	s.warn(eventStateLost, fmt.Sprintf("%v: devices are served, but their change tracking ends with the machine, and snapshots that need a snapstore in it are lost; "+
		"see to its disk, then start the daemon anew", s.stateless))
	return nil
}

// awaitState is takeState, and errHangs where that hangs: then it gives up as soon as it
// can, and what it has is given back.
func (s *service) awaitState(ctx context.Context) (*dirLock, error) {
	ctx, giveUp := context.WithCancel(ctx)
	defer giveUp()
	type taken struct {
		lock *dirLock
		err  error
	}
	done, alive := make(chan taken), make(chan struct{})
	go func() {
		l, err := s.takeState(ctx, func() {
			select {
			case alive <- struct{}{}:
			case <-ctx.Done():
			}
		})
		select {
		case done <- taken{l, err}:
		case <-ctx.Done():
			if l != nil {
				l.unlock()
			}
		}
	}()
	late := time.NewTimer(answerWait)
	defer late.Stop()
	for {
		select {
		case t := <-done:
			return t.lock, t.err
		case <-alive:
			late.Reset(answerWait)
		case <-late.C:
			return nil, errHangs
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// takeState makes the state directory and locks it. It calls alive whenever the directory's
// disk has answered.
func (s *service) takeState(ctx context.Context, alive func()) (*dirLock, error) {
	dir := s.set.state
	if err := checkGround(ctx, "state directory", dir, probeRead); err != nil {
		return nil, err
	}
	alive()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err := makePrivate(dir); err != nil {
		return nil, err
	}
	alive()
	s.freeKilled(ctx, dir)
	alive()
	l, err := openLock(dir)
	if err != nil {
		return nil, err
	}
	return l.take(ctx, dir, s.set.control, stopWait, alive)
}

// diskFails says whether err is of a disk that hangs, fails or takes nothing more, rather
// than of a path that cannot be what was meant. (What stands on one of our own exports, which
// nobody serves yet, cannot be told from a disk that hangs: EDEADLK.)
func diskFails(err error) bool {
	if errors.Is(err, errHangs) {
		return true
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return false
	}
	switch errno {
	case syscall.EACCES, syscall.EPERM, syscall.ENOENT, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP,
		syscall.ENAMETOOLONG, syscall.EINVAL, syscall.EBUSY:
		return false
	}
	return true
}

// warn says what the daemon goes on without. It is an event as soon as there are events.
func (s *service) warn(kind, text string) {
	s.log.Warn(kind, "text", text)
	s.lost = append(s.lost, Event{Time: time.Now(), Kind: kind, Text: text})
}

// tellLost lets the daemon and its catalogue know what they go on without.
func (s *service) tellLost() {
	for _, e := range s.lost {
		s.daemon.events.add(e)
	}
	s.daemon.stateless, s.daemon.storeless = s.stateless, s.storeless
	if s.stateless != nil {
		s.daemon.cat.WithoutState(s.stateless)
	}
}

// dirs are where we keep what outlives us: the run directory first, and last where that is
// which outlives the machine.
func (s *service) dirs() []string {
	if s.stateless != nil || s.set.state == s.set.run {
		return []string{s.set.run}
	}
	return []string{s.set.run, s.set.state}
}

// inState says whether a part of the snapstore lies in the state directory.
func (s *service) inState(part store.Spec) bool {
	return strings.HasPrefix(part.Path, filepath.Clean(s.set.state)+"/")
}

// leaveOut says whether the start goes on without a part of the snapstore for the reason
// why, and tells it.
func (s *service) leaveOut(part store.Spec, why error) bool {
	if !errors.Is(why, errHangs) && !(s.inState(part) && diskFails(why)) {
		return false
	}
	if s.storeless = why; why != s.stateless { // else it has been said
		s.warn(eventPartLost, fmt.Sprintf("%v: the snapstore goes without it, and snapshots that need it are lost; see to its disk, then start the daemon anew", why))
	}
	return true
}

// checkStore refuses a snapshot where there is no snapstore because its disk fails.
func (d *Daemon) checkStore() error {
	if d.storeless == nil || len(d.pool.Parts()) > 0 {
		return nil
	}
	return refuse(syscall.ENOSPC, "there is no snapstore: %v", d.storeless)
}
