// Errors on their way out: to the control socket, to the tree, and to the exit
// status of the command line.

package control

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"syscall"
)

// ErrFullRead says that the changes asked for are not known: only a copy of
// everything that is allocated (since/all) is right. A command that meets it
// ends with status 3.
var ErrFullRead = errors.New("a full read is due")

// refusal is an error in our own words that still matches an errno.
type refusal struct {
	text  string
	errno syscall.Errno
}

func (r *refusal) Error() string { return r.text }
func (r *refusal) Unwrap() error { return r.errno }

// refuse makes an error that reads as the format says and that errors.Is takes
// for errno: the tree and the shim answer with it, and it becomes the Kind of
// an Error on the control socket.
func refuse(errno syscall.Errno, format string, args ...any) error {
	return &refusal{fmt.Sprintf(format, args...), errno}
}

// unknown refuses the name of a device or a snapshot that nothing has.
func unknown(kind, name string) error {
	return refuse(syscall.ENOENT, "there is no %s %q", kind, clip(name))
}

// Error is an error as the control socket carries it.
type Error struct {
	Kind Kind   `json:"kind"`
	Text string `json:"text"`
}

func (e *Error) Error() string { return e.Text }

// Is lets a client ask for what the daemon would ask for: an errno or
// ErrFullRead.
func (e *Error) Is(target error) bool {
	for _, k := range kinds {
		if k.kind == e.Kind {
			return target == k.err
		}
	}
	return false
}

// Kind says what the caller can do about an error.
type Kind string

// kinds relates errors inside the daemon to Kinds and HTTP statuses. The first
// that matches counts; whatever is not here is "failed".
var kinds = []struct {
	err    error
	kind   Kind
	status int
}{
	{ErrFullRead, "full-read", http.StatusGone},
	{syscall.EINVAL, "invalid", http.StatusBadRequest},
	{syscall.ENOENT, "not-found", http.StatusNotFound},
	{syscall.EEXIST, "exists", http.StatusConflict},
	{syscall.EBUSY, "busy", http.StatusLocked},
	{syscall.ENOSPC, "full", http.StatusInsufficientStorage},
	{syscall.ETIMEDOUT, "timed-out", http.StatusGatewayTimeout},
	{syscall.ESHUTDOWN, "stopping", http.StatusServiceUnavailable},
}

// wireError translates err for the control socket, with the HTTP status that
// goes with it.
func wireError(err error) (*Error, int) {
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			return &Error{k.kind, err.Error()}, k.status
		}
	}
	return &Error{"failed", err.Error()}, http.StatusInternalServerError
}

// OneLine is an error's text as one line, however many errors it joins.
func OneLine(err error) string {
	return strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), "; ")
}

// ExitStatus is the status with which a command ends: 0 without an error, 3
// where a full read is due, 1 for every other error.
func ExitStatus(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ErrFullRead):
		return 3
	}
	return 1
}
